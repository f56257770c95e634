"""Rollouts that grow in windows (T-PPO): what of a group trains in a step, and what the next step continues."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from clipo_megatron.flow import RolloutGroup, ScoredGroup
from clipo_megatron.rollout.engine import Request


def continuations(groups: Iterable[RolloutGroup]) -> list[Request]:
    """The next step's requests for groups in which some rollouts have not ended.

    By then all their tokens so far will have trained. Rollouts that have ended stay in the request, so that the engine
    does not generate them again.
    """
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


def count_unfinished(requests: Iterable[Request], samples: int) -> int:
    """The number of rollouts that have not ended, or not begun, in requests for `samples` rollouts each."""
    return sum(samples - sum(each.finish != "abort" for each in request.begun) for request in requests)


def is_complete(request: Request, samples: int) -> bool:
    """Whether all rollouts of a request have ended, so that no engine is needed for it."""
    return len(request.begun) == samples and all(rollout.finish != "abort" for rollout in request.begun)
