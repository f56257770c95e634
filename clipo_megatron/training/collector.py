"""How a step gets its graded groups: prompts -> requests -> engine -> graders, round by round.

A round asks for as many prompts as groups are missing, and over-sampling for some more; each rank that asks takes the
first that finish. With dynamic sampling, groups that are all right or all wrong do not count as long as there are
rounds left. What is then still unfinished is dropped, or carried into the next round and the next step.

Where rollouts grow in windows, one round is a step: what each rollout gained trains, and those that have not ended are
carried into the next step, in which they take the places of so many rollouts.

Every prompt drawn from the sampler gets a ticket, the same on all ranks: the order of drawing, and the `position` of
its request. Of a step's groups, those chosen get the positions 0, 1, ... in order of their tickets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch.distributed as dist

from clipo_megatron.config.schema import RolloutConfig, Unfinished
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import Cancelled, Engine, EngineError, Generation, Request, SamplingParams, never
from clipo_megatron.rollout.generate_all import generate_all, with_partial
from clipo_megatron.training.partial_rollouts import going_on, of_this_step, open_rollouts
from clipo_megatron.training.prompt_assignment import choose, deal, deal_by_load, oversampled, share


@dataclass(slots=True)
class _Standing:
    """What a rank tells the others after a round."""

    groups: list[tuple[int, bool]]  # ticket of each complete group of the step, and whether it teaches
    carried: int  # prompts asked for and not finished; with windows, rollouts that go on
    dropped: int  # prompts of this round that were given up
    spent_s: float  # since the step began


@dataclass(slots=True)
class _StepCounters:
    """What is counted over a step; the same on every rank."""

    rounds: int = 0
    refilled: int = 0  # prompts drawn after the first round
    dropped: int = 0
    recoveries: int = 0
    groups: dict[int, tuple[int, bool]] = field(default_factory=dict)  # ticket -> rank that has it, whether it teaches
    spent_s: list[float] = field(default_factory=list)  # when each round ended, on the slowest rank

    def has_time(self, deadline_s: float) -> bool:
        """Whether a further round as long as the longest so far would end in time."""
        rounds = [end - start for start, end in zip([0.0, *self.spent_s], self.spent_s, strict=False)]
        return not rounds or self.spent_s[-1] + max(rounds) < deadline_s


class Collector:
    """A step's graded groups. `collect` and `state_dict` are collective; every rank has a collector.

    Args:
        config: deadline, over-sampling, what becomes of unfinished rollouts.
        max_refill_rounds: dynamic sampling, the times a step that groups which teach nothing are replaced; 0: it is
            off.
        prompts: all training prompts, the same on every rank.
        sampler: gives their indices, the same on every rank; `prompts_per_step` of it is the size of a batch.
        engine: this rank's; None where it asks for nothing.
        graders: this rank's.
        sampling: how to sample; step and window are filled in.
        rollout_ranks: the ranks that ask for rollouts, in order.
        recover: collective; gives an engine that was lost and came back the current weights.
        progress: is told this rank's finished and wanted rollouts of a round.
        give_up: whether this rank is to generate no longer, because the run is to end.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        max_refill_rounds: int,
        prompts: Sequence[Prompt],
        sampler: PromptSampler,
        engine: Engine | None,
        graders: GraderPool,
        sampling: SamplingParams,
        rollout_ranks: Sequence[int],
        resync: Callable[[], None],
        progress: Callable[[int, int], None] = lambda done, wanted: None,
        should_cancel: Callable[[], bool] = never,
    ):
        self.config, self.max_refill_rounds = config, max_refill_rounds
        self.prompts, self.sampler = prompts, sampler
        self.engine, self.graders, self.sampling = engine, graders, sampling
        self.rollout_ranks, self.resync, self.progress, self.should_cancel = (
            list(rollout_ranks),
            resync,
            progress,
            should_cancel,
        )
        self._windows = config.window_tokens is not None
        self._rank = dist.get_rank()
        self._began = 0.0  # when the step did
        self._ticket = 0  # of the next prompt drawn
        self._carried: list[Request] = []  # this rank's, to be asked for again; complete ones wait to be taken
        self._running: list[Request] = []  # this rank's, which the engine goes on with
        self._left: Generation | None = None  # the generation they were left by
        self._carried_by = [0] * len(self.rollout_ranks)  # `_weight` of those of each asker; the same on every rank

    # --- a step --------------------------------------------------------------------------------------------------

    def collect(self, step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        """This rank's part of the step's batch of sampler.prompts_per_step groups, and the step's counts.

        rollout/rounds             1, and one more for each time that groups were replaced
        rollout/refilled_groups    prompts that were drawn to replace groups
        rollout/discarded_groups   finished groups that neither train nor are carried over
        rollout/dropped_prompts    prompts asked for, not finished and given up; their next chance is the next epoch
        rollout/carried_prompts    prompts that the next step begins with; with windows, the places that their open
                                   rollouts take in its batch
        rollout/mixed_groups       share of the finished groups with both right and wrong answers, before any choice
        rollout/recoveries         times that an engine was lost and asked again

        Raises:
            EngineError: rollout.deadline_s has passed, or an engine failed for good.
            Abandoned: on every rank, because `should_cancel` said so on one; sampler and collector are where they were
                before, but for graders that may still be at work.
        """
        sampler, carried = self.sampler.state_dict(), [*self._carried, *self._running]
        begun_as = (self._ticket, self._carried_by)
        try:
            return self._collect(step)
        except Cancelled:
            self.sampler.load_state_dict(sampler)
            self._ticket, self._carried_by = begun_as
            self._carried, self._running, self._left = sorted(carried, key=_ticket), [], None
            raise

    def _collect(self, step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        params = replace(self.sampling, step=step, window_tokens=self.config.window_tokens)
        self._began = time.monotonic()
        deadline = self._began + self.config.deadline_s
        size = missing = self.sampler.prompts_per_step
        held: dict[int, ScoredGroup] = {}
        tally = _StepCounters()
        while missing > 0 and tally.rounds <= self.max_refill_rounds and tally.has_time(self.config.deadline_s):
            first = self._ticket
            fresh = self._draw(missing)
            if tally.rounds:
                tally.refilled += self._ticket - first
            quota = len(self._carried) + len(fresh) if self._windows else share(missing, self.rollout_ranks, self._rank)
            scored, dropped, recoveries = self._round(fresh, quota, params, deadline)
            held |= {each.group.position: each for each in scored}
            tally.rounds, tally.recoveries = tally.rounds + 1, tally.recoveries + recoveries
            self._meet(held, dropped, tally)
            missing = (
                size - sum(has_reward_variance for _, has_reward_variance in tally.groups.values())
                if self.max_refill_rounds
                else 0
            )
        if self._windows:
            size = len(tally.groups)
        positions, surplus = choose(tally.groups, size)
        mine = self._hand_over(held, positions, surplus, tally)
        finished = tally.groups.values()
        return mine, {
            "rollout/rounds": float(tally.rounds),
            "rollout/refilled_groups": float(tally.refilled),
            "rollout/discarded_groups": float(len(finished) - size - len(surplus)),
            "rollout/dropped_prompts": float(tally.dropped),
            "rollout/carried_prompts": float(self._places()),
            "rollout/mixed_groups": sum(has_reward_variance for _, has_reward_variance in finished) / len(finished),
            "rollout/recoveries": float(tally.recoveries),
            **self._engine_counts(),
        }

    def _engine_counts(self) -> dict[str, float]:
        """What the engines counted in this step, added up over the ranks that ask; collective."""
        mine = self.engine.take_statistics() if self._rank in self.rollout_ranks else {}
        everybody: list[dict[str, float]] = [mine] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        return {name: sum(each.get(name, 0.0) for each in everybody) for name in sorted(set().union(*everybody))}

    def _draw(self, missing: int) -> list[Request]:
        """Draw what a batch, or over-sampling, asks for beyond what is carried already; this rank's part of it."""
        if self._windows:
            owners = deal_by_load(self._carried_by, missing - self._places(), self.sampling.samples)
        else:
            room = [
                oversampled(share(missing, self.rollout_ranks, asker), self.config.over_sampling) - carried
                for asker, carried in zip(self.rollout_ranks, self._carried_by, strict=True)
            ]
            owners = deal(room)
        request_ids = range(self._ticket, self._ticket + len(owners))
        self._ticket += len(owners)
        return [
            Request(request_id, self.prompts[index])
            for request_id, owner, index in zip(request_ids, owners, self.sampler.draw(len(owners)), strict=True)
            if self.rollout_ranks[owner] == self._rank
        ]

    def _round(
        self, fresh: list[Request], quota: int, params: SamplingParams, deadline: float
    ) -> tuple[list[ScoredGroup], int, int]:
        """Ask for this rank's prompts until `quota` groups count; collective.

        Returns:
            Its finished groups, how many prompts it gave up, and how often an engine was lost.
        """
        intake = _Intake(self.graders, quota, self.max_refill_rounds > 0, params.samples, self.progress)
        whole = [each for each in self._carried if is_whole(each, params.samples)]
        waiting = [each for each in self._carried if not is_whole(each, params.samples)] + fresh
        for each in whole:
            intake.take(RolloutGroup(each.position, each.prompt, list(each.begun)))
        satisfied = intake.enough()
        remainder = generate_all(
            self.engine,
            [] if satisfied else waiting,
            params,
            take=intake.take,
            resync=self.resync,
            deadline=deadline,
            running=[] if satisfied else self._running,
            unfinished=self.config.unfinished,
            should_cancel=self.should_cancel,
        )
        dropped = 0
        if satisfied:
            self._carried = waiting
        else:
            self._left = remainder.running
            self._running = remainder.unanswered if remainder.running else []
            self._carried = remainder.unanswered if self._carries and not remainder.running else []
            dropped = len(remainder.unanswered) - len(self._running) - len(self._carried)
        groups = intake.groups()
        if self._windows:
            self._carried = going_on(each.group for each in groups)
        return groups, dropped, remainder.resyncs

    def _meet(self, held: dict[int, ScoredGroup], dropped: int, tally: _StepCounters) -> None:
        """Let every rank know where the step stands; collective."""
        dynamic = self.max_refill_rounds > 0
        mine = _Standing(
            [(request_id, has_reward_variance(scored) if dynamic else True) for request_id, scored in held.items()],
            self._weight([*self._carried, *self._running]),
            dropped,
            time.monotonic() - self._began,
        )
        everybody: list[_Standing] = [mine] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        tally.groups = {
            request_id: (rank, counts) for rank, each in enumerate(everybody) for request_id, counts in each.groups
        }
        tally.spent_s.append(max(each.spent_s for each in everybody))
        tally.dropped += sum(each.dropped for each in everybody)
        self._carried_by = [everybody[asker].carried for asker in self.rollout_ranks]

    def _hand_over(
        self, held: dict[int, ScoredGroup], positions: dict[int, int], surplus: Sequence[int], tally: _StepCounters
    ) -> list[ScoredGroup]:
        """This rank's chosen groups under their positions; surplus ones are kept for the next step.

        There are some where more groups were carried over complete than a round needed: interrupting an engine may
        give groups that it had just finished.
        """
        for request_id in surplus:
            rank, _ = tally.groups[request_id]
            self._carried_by[self.rollout_ranks.index(rank)] += 1
            if rank == self._rank:
                group = held[request_id].group
                self._carried.append(Request(request_id, group.prompt, tuple(group.rollouts)))
        self._carried.sort(key=_ticket)
        chosen = [held[request_id] for request_id in sorted(held) if request_id in positions]
        if self._windows:
            chosen = [of_this_step(scored) for scored in chosen]
        for scored in chosen:
            scored.group.position = positions[scored.group.position]
        return chosen

    # --- between steps -------------------------------------------------------------------------------------------

    def withdraw(self) -> None:
        """End what the engine was left running with and keep what there is of it, so that others can use the engine."""
        if self._left is not None:
            self._carried = sorted([*self._carried, *with_partial(self._left.stop(), self._running)], key=_ticket)
            self._left, self._running = None, []

    @property
    def _carries(self) -> bool:
        return self.config.unfinished is not Unfinished.drop

    def _weight(self, requests: Sequence[Request]) -> int:
        """Prompts of carried requests, or rollouts, where those go on in windows."""
        return open_rollouts(requests, self.sampling.samples) if self._windows else len(requests)

    def _places(self) -> int:
        """Places of a batch that everything carried takes."""
        carried = sum(self._carried_by)
        return math.ceil(carried / self.sampling.samples) if self._windows else carried

    def state_dict(self) -> dict[str, Any]:
        """What all ranks carry over, in order of tickets, on rank 0; collective. Rollouts that the engine goes on with
        are in it as they were when it got them."""
        mine = {
            each.position: {"id": each.prompt.id, "begun": [_facts(rollout) for rollout in each.begun]}
            for each in [*self._carried, *self._running]
        }
        everybody: list[dict[int, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
        dist.gather_object(mine, everybody if self._rank == 0 else None)
        return {"carried": [facts for _, facts in sorted(item for part in everybody for item in part.items())]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Deal what was carried over out to the ranks that ask now.

        Where rollouts are not carried over, or are to be fewer or shorter now, the prompts are asked for anew.

        Raises:
            ValueError: a prompt is not among the training prompts.
        """
        by_id = {prompt.id: prompt for prompt in self.prompts} if state["carried"] else {}
        dealt: list[list[Request]] = [[] for _ in self.rollout_ranks]
        self._carried, self._running, self._left = [], [], None
        self._ticket = len(state["carried"])
        for request_id, each in enumerate(state["carried"]):
            if each["id"] not in by_id:
                raise ValueError(
                    f"the checkpoint holds rollouts of prompt {each['id']}, which is not among the training prompts: "
                    "restore data.train, or choose another train.output"
                )
            rollouts = tuple(Rollout(**facts) for facts in each["begun"])
            fits = (self._carries or self._windows) and all(map(self._asked_for, rollouts))
            dealt[request_id % len(self.rollout_ranks)].append(
                Request(request_id, by_id[each["id"]], rollouts if fits else ())
            )
        self._carried_by = [self._weight(requests) for requests in dealt]
        if self._rank in self.rollout_ranks:
            self._carried = dealt[self.rollout_ranks.index(self._rank)]

    def _asked_for(self, rollout: Rollout) -> bool:
        """Whether a rollout of an earlier session could be one of this one's."""
        fits = rollout.sample < self.sampling.samples and rollout.tokens.numel() <= self.sampling.max_new_tokens
        return fits and (self._windows or not rollout.trained)


class _Intake:
    """Takes a rank's groups of one round, until enough of them count."""

    def __init__(
        self, graders: GraderPool, quota: int, dynamic: bool, samples: int, progress: Callable[[int, int], None]
    ):
        self.graders, self.quota, self.dynamic, self.samples, self.progress = graders, quota, dynamic, samples, progress
        self._taken = 0
        self._scored: list[ScoredGroup] = []

    def take(self, group: RolloutGroup) -> bool:
        """Have a group graded; whether no more are needed."""
        broken = [rollout for rollout in group.rollouts if rollout.finish == "abort"]
        if broken or len(group.rollouts) != self.samples:
            raise EngineError(
                f"the engine answered prompt {group.prompt.id} with {len(group.rollouts)} rollouts, {len(broken)} of "
                f"them unfinished, and {self.samples} were asked for"
            )
        self.graders.submit(group)
        self._taken += 1
        self.progress(min(self._taken, self.quota) * self.samples, self.quota * self.samples)
        return self.enough()

    def enough(self) -> bool:
        """Whether no more groups are needed."""
        if not self.dynamic or self._taken < self.quota:
            return self._taken >= self.quota
        self._scored += self.graders.finished()
        if self._teaching() + self._taken - len(self._scored) < self.quota:
            return False
        # The verdicts that are missing may be all that is missing: they take less time than the next group may.
        self._scored += self.graders.collect()
        return self._teaching() >= self.quota

    def _teaching(self) -> int:
        return sum(map(has_reward_variance, self._scored))

    def groups(self) -> list[ScoredGroup]:
        """All that were taken, graded."""
        return self._scored + self.graders.collect()


def has_reward_variance(scored: ScoredGroup) -> bool:
    """Whether a group has both right and wrong answers."""
    return {True, False} <= {verdict.correct for verdict in scored.verdicts}


def is_whole(request: Request, samples: int) -> bool:
    """Whether a request needs no engine any more."""
    return len(request.begun) == samples and all(rollout.finish != "abort" for rollout in request.begun)


def _ticket(request: Request) -> int:
    return request.position


def _facts(rollout: Rollout) -> dict[str, Any]:
    return {each.name: getattr(rollout, each.name) for each in fields(Rollout)}
