"""What the ranks know of a step whose rollouts they collect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clipo_megatron.rollout.engine import SamplingParams


@dataclass(frozen=True, slots=True)
class Span:
    """The steps whose batches a collection is about."""

    step: int  # whose batch is collected
    last: int  # whose batch is the last that is requested by now
    params: SamplingParams
    deadline: float  # on the clock of time.monotonic()


@dataclass(slots=True)
class RankStatus:
    """What a rank tells the others after a round of requests."""

    # request id of each complete group of the step, whether it counts, and whether its answers are right and wrong
    groups: list[tuple[int, bool, bool]]
    open: Counter[int]  # step -> open requests of its batch; with windows, unfinished rollouts
    copies: list[tuple[str, int]]  # prompt id and occurrence of what is open
    going_on: list[int]  # request ids of groups of this step that go on in a later one
    dropped: list[int]  # request ids of this round that were dropped
    restarted: int  # prompts of this round that begin anew, because their rollouts were too old
    elapsed_s: float  # since the step began


@dataclass(slots=True)
class StepCounters:
    """Counters of a step; the same on every rank."""

    rounds: int = 0
    refilled: int = 0  # prompts drawn after the first round
    restarted: int = 0  # prompts that begin anew, because their rollouts were too old
    recoveries: int = 0  # how often an engine was lost and requests were sent again
    # Request id of each complete group -> the rank that has it, and whether it counts.
    groups: dict[int, tuple[int, bool]] = field(default_factory=dict)
    mixed: int = 0  # complete groups with right and wrong answers
    copies: set[tuple[str, int]] = field(default_factory=set)  # prompt id and occurrence of what is open
    going_on: set[int] = field(default_factory=set)  # request ids of groups whose windows go on
    dropped: list[int] = field(default_factory=list)  # request ids that were not finished, and not carried over
    elapsed_s: list[float] = field(default_factory=list)  # at the end of each round, on the slowest rank

    def has_time(self, deadline_s: float) -> bool:
        """Whether another round would end in time if it took as long as the longest so far."""
        rounds = [end - start for start, end in zip([0.0, *self.elapsed_s], self.elapsed_s, strict=False)]
        return not rounds or self.elapsed_s[-1] + max(rounds) < deadline_s

    def take(self, everybody: Sequence[RankStatus]) -> None:
        """Take in what all ranks told after a round."""
        self.groups = {
            request_id: (rank, counts) for rank, each in enumerate(everybody) for request_id, counts, _ in each.groups
        }
        self.mixed = sum(mixed for each in everybody for _, _, mixed in each.groups)
        self.copies = {pair for each in everybody for pair in each.copies}
        self.going_on = {request_id for each in everybody for request_id in each.going_on}
        self.elapsed_s.append(max(each.elapsed_s for each in everybody))
        self.restarted += sum(each.restarted for each in everybody)
        self.dropped += [request_id for each in everybody for request_id in each.dropped]


def from_step(step: int, open_by: Mapping[int, int]) -> Counter[int]:
    """What is open by batch, where that of earlier batches belongs to the batch of `step`."""
    count: Counter[int] = Counter()
    for batch, number in open_by.items():
        count[max(step, batch)] += number
    return count
