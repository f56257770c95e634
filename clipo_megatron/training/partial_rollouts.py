"""Rollouts that grow in windows: what of a group trains in a step, and what the next step goes on with (T-PPO)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from clipo_megatron.flow import RolloutGroup, ScoredGroup
from clipo_megatron.rollout.engine import Request


def going_on(groups: Iterable[RolloutGroup]) -> list[Request]:
    """What the next step asks of groups in which some rollouts have not ended; all tokens that they have will have
    trained by then. Rollouts that have ended stay with their group, so that nobody asks for them again."""
    return [
        Request(
            group.position,
            group.prompt,
            tuple(
                replace(each, trained=each.tokens.numel(), finish="abort" if each.finish == "window" else each.finish)
                for each in group.rollouts
            ),
        )
        for group in groups
        if any(each.finish == "window" for each in group.rollouts)
    ]


def of_this_step(scored: ScoredGroup) -> ScoredGroup:
    """The group without the rollouts that ended in earlier steps."""
    pairs = zip(scored.group.rollouts, scored.verdicts, strict=True)
    kept = [(rollout, verdict) for rollout, verdict in pairs if not rollout.spent]
    group = replace(scored.group, rollouts=[rollout for rollout, _ in kept])
    return ScoredGroup(group, [verdict for _, verdict in kept])


def open_rollouts(requests: Iterable[Request], samples: int) -> int:
    """How many rollouts of requests for `samples` each have not ended, those among them that have not begun."""
    return sum(samples - sum(each.finish != "abort" for each in request.begun) for request in requests)
