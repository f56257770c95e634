"""How a step gets its graded groups: prompts -> requests -> engine -> graders, in rounds.

A round requests as many prompts as groups are missing, and some more with over-sampling. Each rank that sends requests
takes the first groups that finish. With dynamic sampling, zero-advantage groups do not count: they are replaced as long
as rounds are left. Requests that are unfinished at the end are dropped, or carried over into the next round and the
next step.

With `rollout.ahead` = k, a step also sends the requests of the k batches after its own, which the engine generates
while the step trains. Batches take requests in the order in which they were begun, and the batch that a step begins is
the one that trains k steps later: no token is older than k updates when it trains. With over-sampling a step takes the
groups that finish first instead, as long as every request can still train within k steps of its beginning.

Where rollouts grow in windows, a step has one round. What each rollout gained trains, and unfinished rollouts are
carried over into the batch that the next step begins, where they take the places of as many new ones.

The id of a request, which is also its `position`, is the prompt's number in the order of drawing, the same on all
ranks. The selected groups of a step get the positions 0, 1, ... in that order. Copies of a prompt that are at work at
the same time are counted by `occurrence`, so that their rollouts are drawn differently.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from itertools import count
from typing import Any

import torch.distributed as dist

from clipo_megatron.config.schema import RolloutConfig, Unfinished
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import Cancelled, EngineError, Request, SamplingParams
from clipo_megatron.rollout.source import RolloutSource
from clipo_megatron.training.group_buffer import EarlyGrades, GroupBuffer, has_reward_variance
from clipo_megatron.training.ledger import Accounts
from clipo_megatron.training.open_requests import OpenRequests, complete_and_waiting, distribute, oldest
from clipo_megatron.training.partial_rollouts import continuations, of_this_step
from clipo_megatron.training.prompt_assignment import (
    assign_by_load,
    assign_in_turn,
    can_wait,
    fill_batches,
    oversampled,
    select_groups,
    share,
)
from clipo_megatron.training.step_counters import RankStatus, Span, StepCounters, from_step


class Collector:
    """Collects the graded groups of each step. `collect` and `state_dict` are collective; every rank has a collector.

    Args:
        config: deadline, over-sampling, how far ahead requests are sent, and what happens to unfinished ones.
        source: where this rank's rollouts come from.
        graders: judge this rank's responses.
        prompts: all training prompts, the same on every rank.
        sampler: draws their indices, the same on every rank; a batch has `sampler.prompts_per_step` groups.
        sampling: how to sample; the collector sets step and window.
        max_refill_rounds: how often a step may replace zero-advantage groups (dynamic sampling); 0 turns it off.
        progress: called with this rank's numbers of finished and of wanted rollouts of a round.

    Attributes:
        open: this rank's requests that have not trained yet.
        accounts: what became of the prompts in the last step, the same on every rank; None before the first.
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
        self.config, self.source, self.grades = config, source, EarlyGrades(graders)
        self.prompts, self.sampler, self.sampling = prompts, sampler, sampling
        self.max_refill_rounds, self.progress = max_refill_rounds, progress
        self.open = OpenRequests()
        self.accounts: Accounts | None = None
        self._windows = config.window_tokens is not None
        # Whether every group of a batch is waited for, in the order of drawing, while later batches are generated.
        self._in_order = config.ahead > 0 and config.over_sampling == 1 and not self._windows
        self._rank = dist.get_rank()
        self._began = 0.0  # when the step did
        # For each rank that asks, step -> what is open of its batch (`OpenRequests.by_step`); the same on every rank.
        self._open_by: list[Counter[int]] = [Counter() for _ in source.rollout_ranks]
        # (prompt id, occurrence) of what was open or drawn in this step; the same on every rank
        self._in_use: set[tuple[str, int]] = set()

    # --- a step --------------------------------------------------------------------------------------------------

    def collect(self, step: int, *, last: int | None = None) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Collect the step's batch of `sampler.prompts_per_step` groups.

        Args:
            step: the number of the step, which is the version of the weights too.
            last: the run's last step, beyond which no batch is begun; None: there is no last one.

        Returns:
            This rank's part, and metrics:

            rollout/rounds             1, and one more each time that groups were replaced
            rollout/refilled_groups    prompts that were drawn to replace groups
            rollout/discarded_groups   finished groups that neither train nor are carried over
            rollout/dropped_prompts    requested prompts that were not finished and are dropped until the next epoch
            rollout/carried_prompts    prompts that later steps begin with; with windows, the places in their batches
                                       that unfinished rollouts take
            rollout/mixed_groups       share of the finished groups, before any choice, with right and wrong answers
            rollout/recoveries         how often an engine was lost and requests were sent again
            rollout/restarted_prompts  with rollout.ahead: prompts begun anew, because their rollouts were too old

        Raises:
            EngineError: rollout.deadline_s has passed, or an engine failed for good.
            Cancelled: on every rank, because the source of one cancelled. Sampler and collector are as before the call,
                but graders may still be at work.
        """
        sampler, open_requests, due = self.sampler.state_dict(), [*self.open], dict(self.open.due)
        before = ([Counter(each) for each in self._open_by], set(self._in_use))
        ahead = step + self.config.ahead
        params = replace(self.sampling, step=step, window_tokens=self.config.window_tokens)
        self._began = time.monotonic()
        span = Span(step, ahead if last is None else min(ahead, last), params, self._began + self.config.deadline_s)
        try:
            return self._collect(span)
        except Cancelled:
            self.sampler.load_state_dict(sampler)
            self._open_by, self._in_use = before
            self.open = OpenRequests()
            self.open.carry(open_requests)
            self.open.due = due
            raise

    def _collect(self, span: Span) -> tuple[list[ScoredGroup], dict[str, float]]:
        size = missing = self.sampler.prompts_per_step
        held: dict[int, ScoredGroup] = {}
        counters = StepCounters()
        self._open_by = [from_step(span.step, each) for each in self._open_by]
        while missing > 0 and counters.rounds <= self.max_refill_rounds and counters.has_time(self.config.deadline_s):
            drawn = self.sampler.drawn
            fresh = self._draw(missing, span)
            if counters.rounds:
                counters.refilled += self.sampler.drawn - drawn
            scored, dropped, restarted = self._round(fresh, missing, span, counters)
            held |= {each.group.position: each for each in scored}
            self._share_status(held, dropped, restarted, span.step, counters)
            counting = sum(counts for _, counts in counters.groups.values())
            missing = size - counting if self.max_refill_rounds else 0
        if self._windows:
            size = len(counters.groups)
        positions, surplus = select_groups(counters.groups, size)
        mine = self._take_selected(held, positions, surplus, span.step, counters)
        self._in_use = counters.copies
        self.open.forget_the_others()
        self.accounts = Accounts(
            step=span.step,
            drawn=self.sampler.drawn,
            trained=sorted(positions.keys() - counters.going_on),
            zero_advantage=sorted(counters.groups.keys() - positions.keys() - set(surplus)),
            unfinished=sorted(counters.dropped),
        )
        return mine, {
            "rollout/rounds": float(counters.rounds),
            "rollout/refilled_groups": float(counters.refilled),
            "rollout/discarded_groups": float(len(counters.groups) - size - len(surplus)),
            "rollout/dropped_prompts": float(len(counters.dropped)),
            "rollout/carried_prompts": float(self._places()),
            "rollout/mixed_groups": counters.mixed / len(counters.groups),
            "rollout/recoveries": float(counters.recoveries),
            **({"rollout/restarted_prompts": float(counters.restarted)} if self.config.ahead else {}),
            **self._engine_counts(),
        }

    def _engine_counts(self) -> dict[str, float]:
        """The counters of all engines for this step, added up; collective."""
        mine = self.source.engine.take_statistics() if self._rank in self.source.rollout_ranks else {}
        everybody: list[dict[str, float]] = [mine] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        return {name: sum(each.get(name, 0.0) for each in everybody) for name in sorted(set().union(*everybody))}

    def _draw(self, missing: int, span: Span) -> list[Request]:
        """Draw the prompts that are needed beyond the open ones, and return this rank's requests for them."""
        ranks, size = self.source.rollout_ranks, self.sampler.prompts_per_step
        new: list[tuple[int, int]] = []  # step and place among the asking ranks of each new prompt
        if self._windows:
            for step in range(span.step, span.last + 1):
                load = [each[step] for each in self._open_by]
                places = size - math.ceil(sum(load) / self.sampling.samples)
                new += [(step, owner) for owner in assign_by_load(load, places, self.sampling.samples)]
        elif self._in_order:
            wanted = {step: missing if step == span.step else size for step in range(span.step, span.last + 1)}
            targets = {step: [share(number, ranks, rank) for rank in ranks] for step, number in wanted.items()}
            self._open_by, new = fill_batches(self._open_by, targets)
            if self._rank in ranks:
                self.open.assign_steps(self._open_by[ranks.index(self._rank)])
        else:
            room = [
                oversampled(share(missing, ranks, rank), self.config.over_sampling) - open_requests.total()
                for rank, open_requests in zip(ranks, self._open_by, strict=True)
            ]
            new = [(span.step + self.config.ahead, owner) for owner in assign_in_turn(room)]
        fresh, first = [], self.sampler.drawn
        for position, (index, (step, owner)) in enumerate(zip(self.sampler.draw(len(new)), new, strict=True), first):
            request = self._request(position, self.prompts[index])
            if ranks[owner] == self._rank:
                self.open.due[position] = step
                fresh.append(request)
        return fresh

    def _request(self, position: int, prompt: Prompt) -> Request:
        """A new request for a prompt, told apart from the others for the same prompt that are at work."""
        occurrence = next(each for each in count() if (prompt.id, each) not in self._in_use)
        self._in_use.add((prompt.id, occurrence))
        return Request(position, replace(prompt, occurrence=occurrence) if occurrence else prompt)

    def _round(
        self, fresh: list[Request], missing: int, span: Span, counters: StepCounters
    ) -> tuple[list[ScoredGroup], list[int], int]:
        """Send this rank's requests until enough groups count; collective.

        Args:
            fresh: new requests.
            missing: groups that are missing over all ranks.

        Returns:
            The finished groups, the positions of the prompts that were dropped, and how many prompts began anew.
        """
        restarted = self.open.restart_too_old(self.config.ahead) if self.config.ahead else 0
        to_send = [*self.open.carried, *fresh]
        buffer = self._buffer([*to_send, *self.open.running], missing, span)
        begin = span.step + self.config.ahead
        later = [each for each in to_send if self.open.step_of(each) > begin]
        complete, waiting = complete_and_waiting(
            [each for each in to_send if self.open.step_of(each) <= begin], self.sampling.samples
        )
        for each in complete:
            buffer.add(RolloutGroup(each.position, each.prompt, list(each.begun)))
        satisfied = buffer.is_full()
        idle = satisfied and not self.config.ahead  # what is open can wait, and nothing is sent ahead
        rest = self.source.generate_all(
            [] if idle else waiting,
            span.params,
            take=buffer.add,
            deadline=span.deadline,
            running=[] if idle else self.open.running,
            unfinished=Unfinished.keep_running if self.config.ahead else self.config.unfinished,
            wait=not satisfied,
            on_group=self.grades.begin,
        )
        counters.rounds, counters.recoveries = counters.rounds + 1, counters.recoveries + rest.resyncs
        back, dropped = waiting, []
        if not idle:
            self.open.generation = rest.running
            self.open.running, back = (rest.unanswered, []) if rest.running else ([], rest.unanswered)
        if not idle and not self._carries:
            back, dropped = [], [each.position for each in back]
        early = [Request(each.position, each.prompt, tuple(each.rollouts)) for each in buffer.early]
        groups = buffer.groups()
        if self._windows:
            going_on = continuations(each.group for each in groups)
            self.open.due |= {each.position: span.step + self.config.ahead + 1 for each in going_on}
            back = [*back, *going_on]
        self.open.carry([*later, *back, *early])
        return groups, dropped, restarted

    def _buffer(self, requests: Sequence[Request], missing: int, span: Span) -> GroupBuffer:
        """What a round waits for, out of this rank's open requests."""
        ranks, step = self.source.rollout_ranks, span.step
        quota, batch = share(missing, ranks, self._rank), None
        if self._windows or self._in_order:
            batch = {each.position for each in requests if self.open.step_of(each) <= step}
            quota = len(batch)
        a_step = share(self.sampler.prompts_per_step, ranks, self._rank)
        due = {each.position: self.open.step_of(each) for each in requests}

        def others_can_wait(added: Set[int]) -> bool:
            left = (last for position, last in due.items() if position not in added)
            return not self.config.ahead or can_wait(left, step=step, quota=a_step)

        return GroupBuffer(
            self.grades,
            quota,
            needs_variance=self.max_refill_rounds > 0,
            samples=self.sampling.samples,
            progress=self.progress,
            batch=batch,
            can_wait=others_can_wait,
        )

    def _share_status(
        self, held: dict[int, ScoredGroup], dropped: list[int], restarted: int, step: int, counters: StepCounters
    ) -> None:
        """Tell every rank how far the step is; collective."""
        dynamic = self.max_refill_rounds > 0
        mixed = {request_id: has_reward_variance(scored) for request_id, scored in held.items()}
        mine = RankStatus(
            [(request_id, mixed[request_id] or not dynamic, mixed[request_id]) for request_id in held],
            self._by_step(step, self.open),
            [(each.prompt.id, each.prompt.occurrence) for each in self.open],
            [each.position for each in self.open if each.position in held],
            dropped,
            restarted,
            time.monotonic() - self._began,
        )
        everybody: list[RankStatus] = [mine] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        counters.take(everybody)
        self._open_by = [everybody[rank].open for rank in self.source.rollout_ranks]

    def _take_selected(
        self,
        held: dict[int, ScoredGroup],
        positions: dict[int, int],
        surplus: Sequence[int],
        step: int,
        counters: StepCounters,
    ) -> list[ScoredGroup]:
        """This rank's selected groups, at their positions in the batch. Surplus groups are kept for the next step.

        There are surplus groups if more complete groups were carried over than a round needed: an interrupted engine
        may return groups that it had just finished.

        Raises:
            EngineError: a token of a group is older than `rollout.ahead` allows.
        """
        kept = []
        for request_id in surplus:
            rank, _ = counters.groups[request_id]
            self._open_by[self.source.rollout_ranks.index(rank)][step] += 1
            if rank == self._rank:
                group = held[request_id].group
                kept.append(Request(request_id, group.prompt, tuple(group.rollouts)))
        if kept:
            self.open.carry([*self.open.carried, *kept])
        selected = [held[request_id] for request_id in sorted(held) if request_id in positions]
        if self._windows:
            selected = [of_this_step(scored) for scored in selected]
        for scored in selected:
            scored.group.position = positions[scored.group.position]
            age = step - min((oldest(rollout) for rollout in scored.group.rollouts), default=step)
            if self.config.ahead and age > self.config.ahead:
                raise EngineError(
                    f"prompt {scored.group.prompt.id} has tokens of weights {age} updates old, and rollout.ahead is "
                    f"{self.config.ahead}: the engine generated with older weights than it was given"
                )
        return selected

    # --- between steps -------------------------------------------------------------------------------------------

    @property
    def _carries(self) -> bool:
        return self.config.unfinished is not Unfinished.drop or self.config.ahead > 0

    def _places(self) -> int:
        """How many groups of later batches are already taken by what is open."""
        open_now = sum(each.total() for each in self._open_by)
        return math.ceil(open_now / self.sampling.samples) if self._windows else open_now

    def state_dict(self) -> dict[str, Any]:
        """What is open on all ranks, in order of drawing, on rank 0; collective.

        With `rollout.ahead` the engine is stopped for it, so that no generated token is lost. Else, rollouts that the
        engine still generates are in it as they were when it got them.
        """
        if self.config.ahead:
            self.open.stop()
        mine = self.open.facts()
        everybody: list[dict[int, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
        dist.gather_object(mine, everybody if self._rank == 0 else None)
        return {"carried": [facts for _, facts in sorted(item for part in everybody for item in part.items())]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Distribute what was open among the ranks that now send requests.

        If rollouts are not carried over any more, or are to be fewer or shorter, their prompts start again.

        Raises:
            ValueError: a prompt is not among the training prompts.
        """
        ranks = self.source.rollout_ranks
        shares = distribute(state["carried"], self.prompts, among=len(ranks), keeps=self._is_usable)
        self._in_use = {(each.prompt.id, each.prompt.occurrence) for mine in shares for each in mine}
        self._open_by = [self._by_step(0, each) for each in shares]
        self.open = shares[ranks.index(self._rank)] if self._rank in ranks else OpenRequests()

    def _by_step(self, step: int, open_requests: OpenRequests) -> Counter[int]:
        return open_requests.by_step(step, samples=self.sampling.samples, unfinished_rollouts=self._windows)

    def _is_usable(self, rollout: Rollout) -> bool:
        """Whether a rollout of an earlier session could have been generated with this one's settings."""
        return self.sampling.could_give(rollout) and (self._windows or (self._carries and not rollout.trained))
