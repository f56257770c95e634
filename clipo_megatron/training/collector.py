"""How a step gets its graded groups: prompts -> requests -> engine -> graders, in rounds.

A round requests as many prompts as groups are missing, and some more with over-sampling. Each rank that sends requests
takes the first groups that finish. With dynamic sampling, zero-advantage groups do not count: they are replaced as long
as rounds are left. Requests that are unfinished at the end are dropped, or carried over into the next round and the
next step.

Where rollouts grow in windows, a step has one round. What each rollout gained trains, and unfinished rollouts are
carried over into the next step, where they take the places of as many new ones.

Every prompt drawn from the sampler gets a request id, the same on all ranks: its number in the order of drawing, which
is also the `position` of its request. The selected groups of a step get the positions 0, 1, ... in that order. Copies
of a prompt that are at work in the same step are counted by `occurrence`, so that their rollouts are drawn differently.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

import torch.distributed as dist

from clipo_megatron.config.schema import RolloutConfig, Unfinished
from clipo_megatron.data.prompt_table import PromptsById
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import Cancelled, Generation, Request, SamplingParams
from clipo_megatron.rollout.generate_all import with_partial
from clipo_megatron.rollout.source import RolloutSource
from clipo_megatron.training.group_buffer import GroupBuffer, has_reward_variance, is_complete
from clipo_megatron.training.partial_rollouts import continuations, count_unfinished, of_this_step
from clipo_megatron.training.prompt_assignment import (
    assign_by_load,
    assign_in_turn,
    oversampled,
    select_groups,
    share,
)


@dataclass(slots=True)
class _RankStatus:
    """What a rank tells the others after a round of requests."""

    # request id of each complete group of the step, whether it counts, and whether its answers are right and wrong
    groups: list[tuple[int, bool, bool]]
    carried: int  # unfinished prompts; with windows, unfinished rollouts
    copies: list[tuple[str, int]]  # prompt id and occurrence of what is carried over
    dropped: int  # prompts of this round that were dropped
    elapsed_s: float  # since the step began


@dataclass(slots=True)
class _StepCounters:
    """Counters of a step; the same on every rank."""

    rounds: int = 0
    refilled: int = 0  # prompts drawn after the first round
    dropped: int = 0  # prompts that were requested, not finished, and not carried over
    recoveries: int = 0  # how often an engine was lost and requests were sent again
    # Request id of each complete group -> the rank that has it, and whether it counts.
    groups: dict[int, tuple[int, bool]] = field(default_factory=dict)
    mixed: int = 0  # complete groups with right and wrong answers
    copies: set[tuple[str, int]] = field(default_factory=set)  # prompt id and occurrence of what is carried over
    elapsed_s: list[float] = field(default_factory=list)  # at the end of each round, on the slowest rank

    def has_time(self, deadline_s: float) -> bool:
        """Whether another round would end in time if it took as long as the longest so far."""
        rounds = [end - start for start, end in zip([0.0, *self.elapsed_s], self.elapsed_s, strict=False)]
        return not rounds or self.elapsed_s[-1] + max(rounds) < deadline_s


class Collector:
    """Collects the graded groups of each step. `collect` and `state_dict` are collective; every rank has a collector.

    Args:
        config: deadline, over-sampling, and what happens to unfinished requests.
        source: where this rank's rollouts come from.
        graders: judge this rank's responses.
        prompts: all training prompts, the same on every rank.
        sampler: draws their indices, the same on every rank; a batch has `sampler.prompts_per_step` groups.
        sampling: how to sample; the collector sets step and window.
        max_refill_rounds: how often a step may replace zero-advantage groups (dynamic sampling); 0 turns it off.
        progress: called with this rank's numbers of finished and of wanted rollouts of a round.
    """

    def __init__(
        self,
        config: RolloutConfig,
        source: RolloutSource,
        graders: GraderPool,
        *,
        prompts: Sequence[Prompt],
        sampler: PromptSampler,
        sampling: SamplingParams,
        max_refill_rounds: int,
        progress: Callable[[int, int], None] = lambda done, wanted: None,
    ):
        self.config, self.source, self.graders = config, source, graders
        self.prompts, self.sampler, self.sampling = prompts, sampler, sampling
        self.max_refill_rounds, self.progress = max_refill_rounds, progress
        self._windows = config.window_tokens is not None
        self._rank = dist.get_rank()
        self._began = 0.0  # when the step did
        self._next_id = 0  # request id of the next prompt drawn
        self._carried: list[Request] = []  # this rank's, to be sent again; complete ones wait for the next step
        self._running: list[Request] = []  # this rank's, which the engine still generates
        self._generation: Generation | None = None  # the detached generation that they belong to
        self._carried_by = [0] * len(source.rollout_ranks)  # `_weight` of each rank's requests; the same on every rank
        # (prompt id, occurrence) of what was carried over or drawn in this step; the same on every rank
        self._in_use: set[tuple[str, int]] = set()

    # --- a step --------------------------------------------------------------------------------------------------

    def collect(self, step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Collect the step's batch of `sampler.prompts_per_step` groups; returns this rank's part, and metrics:

        rollout/rounds             1, and one more each time that groups were replaced
        rollout/refilled_groups    prompts that were drawn to replace groups
        rollout/discarded_groups   finished groups that neither train nor are carried over
        rollout/dropped_prompts    requested prompts that were not finished and are dropped until the next epoch
        rollout/carried_prompts    prompts that the next step begins with; with windows, the places in its batch that
                                   unfinished rollouts take
        rollout/mixed_groups       share of the finished groups, before any choice, with both right and wrong answers
        rollout/recoveries         how often an engine was lost and requests were sent again

        Raises:
            EngineError: rollout.deadline_s has passed, or an engine failed for good.
            Cancelled: on every rank, because the source of one cancelled. Sampler and collector are as before the call,
                but graders may still be at work.
        """
        sampler, carried = self.sampler.state_dict(), [*self._carried, *self._running]
        before = (self._next_id, self._carried_by, set(self._in_use))
        try:
            return self._collect(step)
        except Cancelled:
            self.sampler.load_state_dict(sampler)
            self._next_id, self._carried_by, self._in_use = before
            self._carried, self._running, self._generation = sorted(carried, key=_request_id), [], None
            raise

    def _collect(self, step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        params = replace(self.sampling, step=step, window_tokens=self.config.window_tokens)
        self._began = time.monotonic()
        deadline = self._began + self.config.deadline_s
        size = missing = self.sampler.prompts_per_step
        held: dict[int, ScoredGroup] = {}
        counters = _StepCounters()
        while missing > 0 and counters.rounds <= self.max_refill_rounds and counters.has_time(self.config.deadline_s):
            first = self._next_id
            fresh = self._draw(missing)
            if counters.rounds:
                counters.refilled += self._next_id - first
            ranks = self.source.rollout_ranks
            quota = len(self._carried) + len(fresh) if self._windows else share(missing, ranks, self._rank)
            scored, dropped, recoveries = self._round(fresh, quota, params, deadline)
            held |= {each.group.position: each for each in scored}
            counters.rounds, counters.recoveries = counters.rounds + 1, counters.recoveries + recoveries
            self._share_status(held, dropped, counters)
            counting = sum(counts for _, counts in counters.groups.values())
            missing = size - counting if self.max_refill_rounds else 0
        if self._windows:
            size = len(counters.groups)
        positions, surplus = select_groups(counters.groups, size)
        mine = self._take_selected(held, positions, surplus, counters)
        finished = counters.groups.values()
        self._in_use = counters.copies
        return mine, {
            "rollout/rounds": float(counters.rounds),
            "rollout/refilled_groups": float(counters.refilled),
            "rollout/discarded_groups": float(len(finished) - size - len(surplus)),
            "rollout/dropped_prompts": float(counters.dropped),
            "rollout/carried_prompts": float(self._places()),
            "rollout/mixed_groups": counters.mixed / len(finished),
            "rollout/recoveries": float(counters.recoveries),
            **self._engine_counts(),
        }

    def _engine_counts(self) -> dict[str, float]:
        """The counters of all engines for this step, added up; collective."""
        mine = self.source.engine.take_statistics() if self._rank in self.source.rollout_ranks else {}
        everybody: list[dict[str, float]] = [mine] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        return {name: sum(each.get(name, 0.0) for each in everybody) for name in sorted(set().union(*everybody))}

    def _draw(self, missing: int) -> list[Request]:
        """Draw the prompts that are needed beyond those carried over, and return this rank's requests for them."""
        ranks = self.source.rollout_ranks
        if self._windows:
            owners = assign_by_load(self._carried_by, missing - self._places(), self.sampling.samples)
        else:
            room = [
                oversampled(share(missing, ranks, rank), self.config.over_sampling) - carried
                for rank, carried in zip(ranks, self._carried_by, strict=True)
            ]
            owners = assign_in_turn(room)
        drawn = [self._request(self.prompts[index]) for index in self.sampler.draw(len(owners))]
        return [request for request, owner in zip(drawn, owners, strict=True) if ranks[owner] == self._rank]

    def _request(self, prompt: Prompt) -> Request:
        """A new request for a prompt, told apart from the others for the same prompt in this step."""
        occurrence = next(each for each in count() if (prompt.id, each) not in self._in_use)
        self._in_use.add((prompt.id, occurrence))
        self._next_id += 1
        return Request(self._next_id - 1, replace(prompt, occurrence=occurrence) if occurrence else prompt)

    def _round(
        self, fresh: list[Request], quota: int, params: SamplingParams, deadline: float
    ) -> tuple[list[ScoredGroup], int, int]:
        """Send this rank's requests until `quota` groups count; collective.

        Returns:
            The finished groups, how many prompts were dropped, and how often an engine was lost.
        """
        dynamic = self.max_refill_rounds > 0
        buffer = GroupBuffer(
            self.graders, quota, needs_variance=dynamic, samples=params.samples, progress=self.progress
        )
        complete = [each for each in self._carried if is_complete(each, params.samples)]
        waiting = [each for each in self._carried if not is_complete(each, params.samples)] + fresh
        for each in complete:
            buffer.add(RolloutGroup(each.position, each.prompt, list(each.begun)))
        satisfied = buffer.is_full()
        rest = self.source.generate_all(
            [] if satisfied else waiting,
            params,
            take=buffer.add,
            deadline=deadline,
            running=[] if satisfied else self._running,
            unfinished=self.config.unfinished,
        )
        dropped = 0
        if satisfied:
            self._carried = waiting
        else:
            self._generation = rest.running
            self._running = rest.unanswered if rest.running else []
            self._carried = rest.unanswered if self._carries and not rest.running else []
            dropped = len(rest.unanswered) - len(self._running) - len(self._carried)
        groups = buffer.groups()
        if self._windows:
            self._carried = continuations(each.group for each in groups)
        return groups, dropped, rest.resyncs

    def _share_status(self, held: dict[int, ScoredGroup], dropped: int, counters: _StepCounters) -> None:
        """Tell every rank how far the step is; collective."""
        dynamic = self.max_refill_rounds > 0
        mixed = {request_id: has_reward_variance(scored) for request_id, scored in held.items()}
        left = [*self._carried, *self._running]
        mine = _RankStatus(
            [(request_id, mixed[request_id] or not dynamic, mixed[request_id]) for request_id in held],
            self._weight(left),
            [(each.prompt.id, each.prompt.occurrence) for each in left],
            dropped,
            time.monotonic() - self._began,
        )
        everybody: list[_RankStatus] = [mine] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        counters.groups = {
            request_id: (rank, counts) for rank, each in enumerate(everybody) for request_id, counts, _ in each.groups
        }
        counters.mixed = sum(mixed for each in everybody for _, _, mixed in each.groups)
        counters.copies = {pair for each in everybody for pair in each.copies}
        counters.elapsed_s.append(max(each.elapsed_s for each in everybody))
        counters.dropped += sum(each.dropped for each in everybody)
        self._carried_by = [everybody[rank].carried for rank in self.source.rollout_ranks]

    def _take_selected(
        self, held: dict[int, ScoredGroup], positions: dict[int, int], surplus: Sequence[int], counters: _StepCounters
    ) -> list[ScoredGroup]:
        """This rank's selected groups, at their positions in the batch. Surplus groups are kept for the next step.

        There are surplus groups if more complete groups were carried over than a round needed: an interrupted engine
        may return groups that it had just finished.
        """
        for request_id in surplus:
            rank, _ = counters.groups[request_id]
            self._carried_by[self.source.rollout_ranks.index(rank)] += 1
            if rank == self._rank:
                group = held[request_id].group
                self._carried.append(Request(request_id, group.prompt, tuple(group.rollouts)))
        self._carried.sort(key=_request_id)
        selected = [held[request_id] for request_id in sorted(held) if request_id in positions]
        if self._windows:
            selected = [of_this_step(scored) for scored in selected]
        for scored in selected:
            scored.group.position = positions[scored.group.position]
        return selected

    # --- between steps -------------------------------------------------------------------------------------------

    def stop_running(self) -> None:
        """Stop requests that the engine still generates, and carry their partial rollouts over; frees the engine."""
        if self._generation is not None:
            partial = with_partial(self._generation.stop(), self._running)
            self._carried = sorted([*self._carried, *partial], key=_request_id)
            self._generation, self._running = None, []

    @property
    def _carries(self) -> bool:
        return self.config.unfinished is not Unfinished.drop

    def _weight(self, requests: Sequence[Request]) -> int:
        """How much the requests load a rank: their number, or with windows that of their unfinished rollouts."""
        return count_unfinished(requests, self.sampling.samples) if self._windows else len(requests)

    def _places(self) -> int:
        """How many groups of the next batch are already taken by what is carried over."""
        carried = sum(self._carried_by)
        return math.ceil(carried / self.sampling.samples) if self._windows else carried

    def state_dict(self) -> dict[str, Any]:
        """What all ranks carry over, by request id, on rank 0; collective.

        Rollouts that the engine still generates are in it as they were when it got them.
        """
        mine = {
            each.position: {
                "id": each.prompt.id,
                "begun": [_facts(rollout) for rollout in each.begun],
                **({"occurrence": each.prompt.occurrence} if each.prompt.occurrence else {}),
            }
            for each in [*self._carried, *self._running]
        }
        everybody: list[dict[int, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
        dist.gather_object(mine, everybody if self._rank == 0 else None)
        return {"carried": [facts for _, facts in sorted(item for part in everybody for item in part.items())]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Distribute what was carried over among the ranks that now send requests.

        If rollouts are not carried over any more, or are to be fewer or shorter, their prompts start again.

        Raises:
            ValueError: a prompt is not among the training prompts.
        """
        by_id = PromptsById(self.prompts)
        assigned: list[list[Request]] = [[] for _ in self.source.rollout_ranks]
        self._carried, self._running, self._generation = [], [], None
        self._next_id = len(state["carried"])
        for request_id, each in enumerate(state["carried"]):
            if each["id"] not in by_id:
                raise ValueError(
                    f"the checkpoint holds rollouts of prompt {each['id']}, which is not among the training prompts: "
                    "restore data.train, or choose another train.output"
                )
            rollouts = tuple(Rollout(**facts) for facts in each["begun"])
            fits = (self._carries or self._windows) and all(map(self._is_usable, rollouts))
            prompt = by_id[each["id"]]
            if occurrence := each.get("occurrence", 0):
                prompt = replace(prompt, occurrence=occurrence)
            request = Request(request_id, prompt, rollouts if fits else ())
            assigned[request_id % len(self.source.rollout_ranks)].append(request)
        self._in_use = {(each.prompt.id, each.prompt.occurrence) for requests in assigned for each in requests}
        self._carried_by = [self._weight(requests) for requests in assigned]
        if self._rank in self.source.rollout_ranks:
            self._carried = assigned[self.source.rollout_ranks.index(self._rank)]

    def _is_usable(self, rollout: Rollout) -> bool:
        """Whether a rollout of an earlier session could have been generated with this one's settings."""
        fits = rollout.sample < self.sampling.samples and rollout.tokens.numel() <= self.sampling.max_new_tokens
        return fits and (self._windows or not rollout.trained)


def _request_id(request: Request) -> int:
    return request.position


def _facts(rollout: Rollout) -> dict[str, Any]:
    return {each.name: getattr(rollout, each.name) for each in fields(Rollout)}
