"""Generates every requested group once, even when the engine is lost and given weights again in between."""

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
    ignore,
    name_prompts,
    never,
)

MAX_RESYNCS = 8  # within one call; an engine that is lost more often does not stay up


@dataclass(slots=True)
class Remainder:
    """What `generate_all` has left undone on a rank."""

    unanswered: list[Request]  # ordered by position; empty unless `take` stopped generation early
    running: Generation | None  # the detached generation that continues with them, if there is one
    resyncs: int  # how often an engine was lost, on any rank


def generate_all(
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
    wait: bool = True,
    on_group: Callable[[RolloutGroup], None] = ignore,
) -> Remainder:
    """Pass groups to `take` as they finish, until all are there or `take` returns True; collective.

    When any rank loses its engine, all ranks call `resync` together, and the unanswered requests are sent again. Ranks
    without requests take part too.

    Args:
        engine: holds the weights to use; None on ranks that send no requests.
        requests: this rank's requests; their positions differ.
        params: how to sample.
        take: receives each group once; returns True when no more groups are needed.
        resync: gives engines that came back the current weights; collective.
        deadline: when everything must have ended, on the clock of time.monotonic().
        running: requests of a detached generation, whose groups the engine yields without being asked again.
        unfinished: what happens to requests that are unfinished when `take` returns True. Under `resume` they are
            returned with their partial rollouts.
        should_cancel: whether to cancel; if any rank's returns True, all ranks cancel.
        wait: whether groups are waited for; False sends the requests only, which needs `keep_running`.
        on_group: see `Generation.detach`.

    Raises:
        Cancelled: on every rank, because one cancelled; groups that `take` received are to be discarded.
        EngineError: the deadline passed, the engine failed for good, or it answered a request that was not open.
    """
    unanswered = {request.position: request for request in (*running, *requests)}
    if len(unanswered) < len(running) + len(requests):
        raise ValueError("two requests have the same position")
    to_send, enough, resyncs = list(requests), False, 0
    detached: Generation | None = None
    while True:
        lost: EngineLostError | None = None
        cancelled = bool(unanswered) and not enough and should_cancel()
        if unanswered and not enough and not cancelled:
            try:
                seconds = max(0.0, deadline - time.monotonic())
                generation = engine.generate(to_send, params, deadline_s=seconds, should_cancel=should_cancel)
                enough = not wait
                while not enough and (group := next(generation, None)) is not None:
                    _mark_answered(group, unanswered)
                    enough = take(group)
                if enough:
                    detached = _interrupt(generation, unanswered, unfinished, on_group)
                if unanswered and not enough:
                    raise EngineError(f"generation ended without an answer to {name_prompts(unanswered.values())}")
            except Cancelled:
                cancelled = True
            except EngineLostError as error:
                lost = error
                # Its requests are newer than ours: they may hold partial rollouts.
                unanswered |= {each.position: each for each in error.unanswered if each.position in unanswered}
                to_send = list(unanswered.values())
        cancelled = cancelled or (lost is not None and should_cancel())
        any_lost, any_overdue, any_cancelled = _any_rank(lost is not None, time.monotonic() >= deadline, cancelled)
        if any_cancelled:
            if detached is not None:
                detached.close()
            raise Cancelled
        if not any_lost:
            return Remainder([unanswered[position] for position in sorted(unanswered)], detached, resyncs)
        resyncs += 1
        if any_overdue or resyncs > MAX_RESYNCS:
            why = "rollout.deadline_s has passed" if any_overdue else f"that was loss {resyncs} in one generation"
            raise EngineError(
                f"{lost or 'another rank lost its engine'}. Not asked again: {why}. Look at the servers' logs; the "
                "same command goes on from the last checkpoint"
            )
        resync()


def _interrupt(
    generation: Generation,
    unanswered: dict[int, Request],
    unfinished: Unfinished,
    on_group: Callable[[RolloutGroup], None],
) -> Generation | None:
    """End or detach a generation that is not exhausted; return it if it was detached."""
    if unanswered and unfinished is Unfinished.keep_running:
        generation.detach(on_group)
        return generation
    if unanswered and unfinished is Unfinished.resume:
        unanswered |= {each.position: each for each in with_partial(generation.stop(), unanswered.values())}
    generation.close()
    return None


def with_partial(partial: Sequence[RolloutGroup], requests: Iterable[Request]) -> list[Request]:
    """The requests, each with its rollouts out of the partial groups of an interrupted generation."""
    have = {group.position: tuple(group.rollouts) for group in partial}
    return [each._replace(begun=have.get(each.position, each.begun)) for each in requests]


def _mark_answered(group: RolloutGroup, unanswered: dict[int, Request]) -> None:
    request = unanswered.pop(group.position, None)
    if request is None or request.prompt.id != group.prompt.id:
        raise EngineError(
            f"the engine answered prompt {group.prompt.id} at position {group.position}, which is not among the "
            f"unanswered requests: answered twice, or never asked"
        )


def _any_rank(*facts: bool) -> list[bool]:
    """For each fact, whether it holds on any rank; collective."""
    flags = torch.tensor([int(fact) for fact in facts])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.bool().tolist()
