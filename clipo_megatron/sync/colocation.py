"""Servers and trainer on the same GPUs: who holds the memory when."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import torch
import torch.distributed as dist

from clipo_megatron.rollout.engine import Engine, EngineError, Memory
from clipo_megatron.runtime.platform import platform


class Turn(str, Enum):
    """What the shared memory is used for."""

    generate = "generate"  # the servers have weights and cache
    train = "train"  # the servers have offloaded both
    update = "update"  # the servers have memory for weights, and none for a cache


class WrongTurn(RuntimeError):
    """A call came out of turn; the message says which call comes next."""


class Colocation:
    """Offloads and onloads the memory of an engine that shares its GPUs: generate -> train -> update -> generate.

    Weights and cache are offloaded before training. The memory of the weights is onloaded before an update, the memory
    of the cache after it. A run whose servers offloaded before the policy was built begins with `Turn.train`.
    """

    def __init__(self, engine: Engine, turn: Turn = Turn.generate):
        self.engine, self.turn = engine, turn

    def before_training(self) -> None:
        """Offload weights and cache; nothing may be in flight."""
        self._leave(Turn.generate, "before_training")
        self.engine.offload(Memory.kv_cache, Memory.weights)
        self.turn = Turn.train

    def before_update(self) -> None:
        """Onload the memory of the weights, whose contents are undefined until the update."""
        self._leave(Turn.train, "before_update")
        self.engine.onload(Memory.weights)
        self.turn = Turn.update

    def after_update(self) -> None:
        """Onload the memory of the cache, so that the servers can generate."""
        self._leave(Turn.update, "after_update")
        self.engine.onload(Memory.kv_cache)
        self.turn = Turn.generate

    def _leave(self, turn: Turn, call: str) -> None:
        following = {Turn.generate: "before_training", Turn.train: "before_update", Turn.update: "after_update"}
        if self.turn is not turn:
            raise WrongTurn(
                f"{call} was called while the servers' memory is in turn '{self.turn.value}'; "
                f"{following[self.turn]} comes next"
            )


class OffloadablePolicy(Protocol):
    """The part of a `Policy` that moves its memory on the shared GPUs."""

    def offload(self) -> None:
        """Free everything that only training needs; the weights stay."""
        ...

    def onload(self) -> None:
        """Allocate again what `offload` has freed."""
        ...


class ColocatedSync:
    """A weight sync whose servers share their GPUs with the trainer: `offload` before training,
    `update_weights` after it.

    All methods are collective. The coordinator (global rank 0) moves the servers' memory and every rank its own; no
    rank continues before the memory is there. The servers must have offloaded before this is constructed.

    Args:
        sync: transfers the weights.
        policy: this rank's policy, which has its memory now.
        engine: the pool of servers; used on the coordinator only.
    """

    def __init__(self, sync: Any, policy: OffloadablePolicy, engine: Engine | None):
        self.sync, self.policy = sync, policy
        self._colocation = Colocation(engine, Turn.train) if dist.get_rank() == 0 else None
        self._training = True  # the turn, as every rank knows it

    def offload(self) -> None:
        """Move the servers' memory to the trainer; nothing may be in flight. Idempotent."""
        if not self._training:
            self._coordinate(lambda colocation: colocation.before_training())
            self.policy.onload()
            self._training = True

    def update_weights(self, version: int) -> Any:
        """Offload the trainer, update the servers' weights, then onload the servers' cache."""
        if self._training:
            self.policy.offload()
        else:  # servers came back during generation: they hold memory, and the trainer does not
            self._coordinate(lambda colocation: colocation.before_training())
        self._training = False
        self._coordinate(lambda colocation: colocation.before_update())
        report = self.sync.update_weights(version)
        platform().release_cached_memory()  # of buckets, before the servers allocate their cache
        self._coordinate(lambda colocation: colocation.after_update())
        return report

    def close(self) -> None:
        self.sync.close()

    def _coordinate(self, action: Callable[[Colocation], None]) -> None:
        """Wait for all ranks, then let the coordinator act.

        Raises:
            EngineError: on every rank, because the coordinator's action failed.
        """
        dist.all_reduce(torch.zeros(1))  # on the CPU: every rank has arrived
        failure: list[str] = [""]
        if self._colocation is not None:
            try:
                action(self._colocation)
            except (EngineError, WrongTurn) as error:
                failure[0] = str(error)
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise EngineError(f"the servers' memory could not be moved: {failure[0]}")
