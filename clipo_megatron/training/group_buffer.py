"""Collects and grades a rank's groups of one round, until enough of them count."""

from __future__ import annotations

from collections.abc import Callable

from clipo_megatron.flow import RolloutGroup, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import EngineError, Request


class GroupBuffer:
    """This rank's groups of one round.

    Args:
        graders: judge the responses.
        quota: how many groups are needed.
        needs_variance: whether zero-advantage groups do not count, as in dynamic sampling.
        samples: rollouts of a group.
        progress: called with the numbers of finished and of wanted rollouts.
    """

    def __init__(
        self,
        graders: GraderPool,
        quota: int,
        *,
        needs_variance: bool,
        samples: int,
        progress: Callable[[int, int], None],
    ):
        self.graders, self.quota, self.samples, self.progress = graders, quota, samples, progress
        self.needs_variance = needs_variance
        self._added = 0
        self._scored: list[ScoredGroup] = []

    def add(self, group: RolloutGroup) -> bool:
        """Have a group graded, and return whether no more are needed."""
        unfinished = sum(rollout.finish == "abort" for rollout in group.rollouts)
        if unfinished or len(group.rollouts) != self.samples:
            raise EngineError(
                f"the engine answered prompt {group.prompt.id} with {len(group.rollouts)} rollouts, {unfinished} of "
                f"them unfinished, and {self.samples} were requested"
            )
        self.graders.submit(group)
        self._added += 1
        self.progress(min(self._added, self.quota) * self.samples, self.quota * self.samples)
        return self.is_full()

    def is_full(self) -> bool:
        """Whether no more groups are needed."""
        if not self.needs_variance or self._added < self.quota:
            return self._added >= self.quota
        self._scored += self.graders.finished()
        ungraded = self._added - len(self._scored)
        if self._with_variance() + ungraded < self.quota:
            return False
        # The missing verdicts may be enough, and they take less time than another group may.
        self._scored += self.graders.collect()
        return self._with_variance() >= self.quota

    def groups(self) -> list[ScoredGroup]:
        """All groups, after the last verdict has arrived."""
        return self._scored + self.graders.collect()

    def _with_variance(self) -> int:
        return sum(map(has_reward_variance, self._scored))


def has_reward_variance(scored: ScoredGroup) -> bool:
    """Whether a group has both right and wrong answers; otherwise it is a zero-advantage group."""
    return {True, False} <= {verdict.correct for verdict in scored.verdicts}


def is_complete(request: Request, samples: int) -> bool:
    """Whether all rollouts of a request have ended, so that no engine is needed for it."""
    return len(request.begun) == samples and all(rollout.finish != "abort" for rollout in request.begun)
