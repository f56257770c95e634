"""Collects and grades a rank's groups of one round, until enough of them count."""

from __future__ import annotations

from collections.abc import Callable, Set

from clipo_megatron.flow import RolloutGroup, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool, Grading
from clipo_megatron.rollout.engine import EngineError


class EarlyGrades:
    """Grades groups as soon as they are complete, also those that no step waits for yet."""

    def __init__(self, graders: GraderPool):
        self._graders = graders
        self._begun: dict[int, Grading] = {}  # by position

    def begin(self, group: RolloutGroup) -> None:
        """Start to grade a group; an engine calls it in a thread of its own."""
        self._begun[group.position] = self._graders.grade(group)

    def take(self, group: RolloutGroup) -> Grading:
        """The grading of a group, which starts now unless it has begun."""
        begun = self._begun.pop(group.position, None)
        if begun is not None and [each.text for each in begun.group.rollouts] == [each.text for each in group.rollouts]:
            return begun
        return self._graders.grade(group)


class GroupBuffer:
    """This rank's groups of one round.

    Args:
        grades: judge the responses.
        quota: how many groups are needed.
        needs_variance: whether zero-advantage groups do not count, as in dynamic sampling.
        samples: rollouts of a group.
        progress: called with the numbers of finished and of wanted rollouts.
        batch: positions of the groups to wait for; the others are collected in `early`. None: any groups will do.
        can_wait: whether the groups that have not been added, given those that have, can wait for later steps.
    """

    def __init__(
        self,
        grades: EarlyGrades,
        quota: int,
        *,
        needs_variance: bool,
        samples: int,
        progress: Callable[[int, int], None],
        batch: Set[int] | None = None,
        can_wait: Callable[[Set[int]], bool] = lambda added: True,
    ):
        self.grades, self.quota, self.samples, self.progress = grades, quota, samples, progress
        self.needs_variance, self.batch, self.can_wait = needs_variance, batch, can_wait
        self.early: list[RolloutGroup] = []
        self._added: set[int] = set()
        self._grading: list[Grading] = []
        self._scored: list[ScoredGroup] = []

    def add(self, group: RolloutGroup) -> bool:
        """Have a group graded, and return whether no more are needed."""
        unfinished = sum(rollout.finish == "abort" for rollout in group.rollouts)
        if unfinished or len(group.rollouts) != self.samples:
            raise EngineError(
                f"the engine answered prompt {group.prompt.id} with {len(group.rollouts)} rollouts, {unfinished} of "
                f"them unfinished, and {self.samples} were requested"
            )
        if self.batch is not None and group.position not in self.batch:
            self.grades.begin(group)
            self.early.append(group)
            return self.is_full()
        self._grading.append(self.grades.take(group))
        self._added.add(group.position)
        self.progress(min(len(self._added), self.quota) * self.samples, self.quota * self.samples)
        return self.is_full()

    def is_full(self) -> bool:
        """Whether no more groups are needed."""
        if self.batch is not None:
            return self.batch <= self._added
        if len(self._added) < self.quota or not self.can_wait(self._added):
            return False
        return not self.needs_variance or self._enough_with_variance()

    def _enough_with_variance(self) -> bool:
        waiting = []
        for each in self._grading:
            if each.done():
                self._scored.append(each.result())
            else:
                waiting.append(each)
        self._grading = waiting
        if self._with_variance() + len(self._grading) < self.quota:
            return False
        # The missing verdicts may be enough, and they take less time than another group may.
        return sum(map(has_reward_variance, self.groups())) >= self.quota

    def groups(self) -> list[ScoredGroup]:
        """All groups by position, after the last verdict has arrived."""
        self._scored += [each.result() for each in self._grading]
        self._grading = []
        return sorted(self._scored, key=lambda each: each.group.position)

    def _with_variance(self) -> int:
        return sum(map(has_reward_variance, self._scored))


def has_reward_variance(scored: ScoredGroup) -> bool:
    """Whether a group has both right and wrong answers; otherwise it is a zero-advantage group."""
    return {True, False} <= {verdict.correct for verdict in scored.verdicts}
