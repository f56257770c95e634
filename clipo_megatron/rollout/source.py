"""This rank's access to rollouts: its engine, which ranks send requests, and how all recover from a lost engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from clipo_megatron.config.schema import Unfinished
from clipo_megatron.flow import RolloutGroup
from clipo_megatron.rollout.engine import Engine, Request, SamplingParams, ignore, never
from clipo_megatron.rollout.generate_all import Remainder, generate_all

T = TypeVar("T")


@dataclass(slots=True)
class RolloutSource:
    """Whoever needs rollouts, a training step or an evaluation, gets them here. Every rank has one.

    Attributes:
        engine: None on ranks that send no requests.
        rollout_ranks: the ranks that send requests, in order; the same on every rank.
        resync: gives engines that came back the current weights; collective.
        should_cancel: whether this rank cancels generation, because the run is to end.
    """

    engine: Engine | None
    rollout_ranks: Sequence[int]
    resync: Callable[[], None]
    should_cancel: Callable[[], bool] = never

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this rank sends requests for when they are dealt out in turn."""
        rank = dist.get_rank()
        if rank not in self.rollout_ranks:
            return []
        return list(items[self.rollout_ranks.index(rank) :: len(self.rollout_ranks)])

    def generate_all(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        take: Callable[[RolloutGroup], bool],
        deadline: float,
        running: Sequence[Request] = (),
        unfinished: Unfinished = Unfinished.drop,
        wait: bool = True,
        on_group: Callable[[RolloutGroup], None] = ignore,
    ) -> Remainder:
        """See `clipo_megatron.rollout.generate_all`; collective."""
        return generate_all(
            self.engine,
            requests,
            params,
            take=take,
            resync=self.resync,
            deadline=deadline,
            running=running,
            unfinished=unfinished,
            should_cancel=self.should_cancel,
            wait=wait,
            on_group=on_group,
        )
