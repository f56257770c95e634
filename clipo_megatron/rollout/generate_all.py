"""Every request answered once, over as many lives of the engine as that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from clipo_megatron.config.schema import Unfinished
from clipo_megatron.flow import RolloutGroup
from clipo_megatron.rollout.engine import (
    Cancelled,
    Engine,
    EngineError,
    EngineLostError,
    Generation,
    Request,
    SamplingParams,
    never,
)

RECOVERIES = 8  # of the engine within one call of `ask`; more mean that the servers do not stay up


@dataclass(slots=True)
class Asked:
    """What a rank is left with after `ask`."""

    unanswered: list[Request]  # by position; none unless `take` had enough
    running: Generation | None  # that goes on with them, where they were left running
    recoveries: int  # times that the engine was lost, on any rank


def ask(
    engine: Engine | None,
    requests: Sequence[Request],
    params: SamplingParams,
    *,
    take: Callable[[RolloutGroup], bool],
    resync: Callable[[], None],
    deadline: float,
    running: Sequence[Request] = (),
    unfinished: Unfinished = Unfinished.drop,
    should_cancel: Callable[[], bool] = never,
) -> Asked:
    """Hand groups to `take` as they finish, until all are there or `take` has enough; collective.

    When a rank's engine is lost, all ranks meet, call `resync` and ask again for what is unanswered. Ranks that have
    nothing to ask take part with no requests.

    Args:
        engine: with the weights to use; None where there is nothing to ask.
        requests: of this rank; positions differ.
        params: how to sample.
        take: gets each group once; True means that no more are needed.
        recover: collective; gives engines that came back the current weights.
        deadline: of time.monotonic(), for everything.
        running: requests that an earlier generation was left with; the engine yields them by itself.
        unfinished: what becomes of requests when `take` has enough: closed, stopped, or left running. Stopped ones are
            returned with the tokens they have, as begun.
        give_up: whether this rank is to generate no longer; where one is, all ranks give up.

    Raises:
        Abandoned: on every rank, because a rank gave up; groups that `take` got count for nothing.
        EngineError: the deadline passed, the engine failed for good, or it answered what nobody had asked.
    """
    unanswered = {request.position: request for request in (*running, *requests)}
    if len(unanswered) < len(running) + len(requests):
        raise ValueError("two requests have the same position")
    to_ask, enough, recoveries = list(requests), False, 0
    part: Generation | None = None
    while True:
        lost: EngineLostError | None = None
        cancelled = bool(unanswered) and not enough and should_cancel()
        if unanswered and not enough and not cancelled:
            try:
                left = max(0.0, deadline - time.monotonic())
                generation = engine.generate(to_ask, params, deadline_s=left, should_cancel=should_cancel)
                for group in generation:
                    _settle(group, unanswered)
                    if enough := take(group):
                        part = _part(generation, unanswered, unfinished)
                        break
                if unanswered and not enough:
                    raise EngineError(f"generation ended without an answer to {_names(unanswered)}")
            except Cancelled:
                cancelled = True
            except EngineLostError as error:
                lost = error
                # What it knows of a request, such as the tokens it has, is newer than what was asked.
                unanswered |= {each.position: each for each in error.unanswered if each.position in unanswered}
                to_ask = list(unanswered.values())
        cancelled = cancelled or (lost is not None and should_cancel())
        anybody, overdue, abandoned = _agree(lost is not None, time.monotonic() >= deadline, cancelled)
        if abandoned:
            if part is not None:
                part.close()
            raise Cancelled
        if not anybody:
            return Asked([unanswered[position] for position in sorted(unanswered)], part, recoveries)
        recoveries += 1
        if overdue or recoveries > RECOVERIES:
            why = "rollout.deadline_s has passed" if overdue else f"that was loss {recoveries} in one generation"
            raise EngineError(
                f"{lost or 'another rank lost its engine'}. Not asked again: {why}. Look at the servers' logs; the "
                "same command goes on from the last checkpoint"
            )
        resync()


def _part(generation: Generation, unanswered: dict[int, Request], unfinished: Unfinished) -> Generation | None:
    """End or leave a generation before it is exhausted; returned if it goes on."""
    if unanswered and unfinished is Unfinished.keep_running:
        generation.leave()
        return generation
    if unanswered and unfinished is Unfinished.resume:
        unanswered |= {each.position: each for each in begun(generation.stop(), unanswered.values())}
    generation.close()
    return None


def begun(partial: Sequence[RolloutGroup], requests: Iterable[Request]) -> list[Request]:
    """The requests, each with the rollouts that an interrupted generation has of it."""
    have = {group.position: tuple(group.rollouts) for group in partial}
    return [each._replace(begun=have.get(each.position, each.begun)) for each in requests]


def _settle(group: RolloutGroup, unanswered: dict[int, Request]) -> None:
    request = unanswered.pop(group.position, None)
    if request is None or request.prompt.id != group.prompt.id:
        raise EngineError(
            f"the engine answered prompt {group.prompt.id} at position {group.position}, which is not among the "
            f"unanswered requests: answered twice, or never asked"
        )


def _names(unanswered: dict[int, Request]) -> str:
    names = [request.prompt.id for request in unanswered.values()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _agree(*facts: bool) -> list[bool]:
    """Which facts hold on any rank."""
    flags = torch.tensor([int(fact) for fact in facts])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.bool().tolist()
