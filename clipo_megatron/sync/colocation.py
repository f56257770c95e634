"""The order in which servers and trainer take turns with the memory of GPUs that they share."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import torch
import torch.distributed as dist

from clipo_megatron.rollout.engine import Engine, EngineError, Memory


class Turn(str, Enum):
    """Who has the memory."""

    generate = "generate"  # the servers have all of theirs
    train = "train"  # the servers have given theirs back
    update = "update"  # the servers have room for weights, and none for a cache


class WrongTurn(RuntimeError):
    """Something was asked for out of turn; the message says what comes next."""


class Colocation:
    """Moves the memory of an engine that shares its GPUs: generate -> train -> update -> generate.

    Weights and cache are released before training; weights are restored, undefined, before they are pushed, and the
    cache after that. A run whose servers gave their memory back before the policy was built begins with `Turn.train`.
    """

    def __init__(self, engine: Engine, turn: Turn = Turn.generate):
        self.engine, self.turn = engine, turn

    def before_training(self) -> None:
        """Nothing is in flight; the servers give back what they can."""
        self._leave(Turn.generate, "before_training")
        self.engine.offload(Memory.kv_cache, Memory.weights)
        self.turn = Turn.train

    def before_push(self) -> None:
        """The servers take the memory of their weights again; its contents are to be pushed."""
        self._leave(Turn.train, "before_push")
        self.engine.onload(Memory.weights)
        self.turn = Turn.update

    def after_push(self) -> None:
        """The servers have weights; they take the memory of their cache again and can generate."""
        self._leave(Turn.update, "after_push")
        self.engine.onload(Memory.kv_cache)
        self.turn = Turn.generate

    def before_generating(self) -> None:
        """Raise unless the servers have weights and cache."""
        self._leave(Turn.generate, "before_generating")

    def _leave(self, turn: Turn, asked: str) -> None:
        following = {Turn.generate: "before_training", Turn.train: "before_push", Turn.update: "after_push"}
        if self.turn is not turn:
            raise WrongTurn(
                f"{asked} was called while the servers' memory is in turn '{self.turn.value}'; "
                f"{following[self.turn]} comes next"
            )


class Trainee(Protocol):
    """Whoever holds the policy on the shared GPUs: a `Policy`."""

    def offload(self) -> None:
        """Free what only training needs; the weights stay."""
        ...

    def onload(self) -> None:
        """Take it again."""
        ...


class ColocatedSync:
    """A weight sync whose servers share their GPUs with the trainer: `offload` before training,
    `update_weights` after it.

    All methods are collective. The coordinator (global rank 0) moves the servers' memory, every rank its own, and
    nobody goes on before the memory is there. The servers must have given theirs back before this is made.

    Args:
        sync: what brings the weights over.
        trainee: this rank's actor; it has its memory now.
        engine: the coordinator's pool of servers.
    """

    def __init__(self, sync: Any, trainee: Trainee, engine: Engine | None):
        self.sync, self.trainee = sync, trainee
        self._turns = Colocation(engine, Turn.train) if dist.get_rank() == 0 else None
        self._training = True  # whose turn it is, known to every rank

    def offload(self) -> None:
        """The servers give their memory to the trainer; nothing is generated any more. Idempotent."""
        if not self._training:
            self._coordinate(lambda turns: turns.before_training())
            self.trainee.onload()
            self._training = True

    def update_weights(self, version: int) -> Any:
        """The trainer gives memory back, the servers get weights, and then room for their cache."""
        if self._training:
            self.trainee.offload()
        else:  # servers that came back in the middle of a generation; they hold memory, the trainer does not
            self._coordinate(lambda turns: turns.before_training())
        self._training = False
        self._coordinate(lambda turns: turns.before_push())
        report = self.sync.update_weights(version)
        self._coordinate(lambda turns: turns.after_push())
        return report

    def close(self) -> None:
        """As the sync's. Idempotent."""
        self.sync.close()

    def _coordinate(self, action: Callable[[Colocation], None]) -> None:
        """Meet, let the coordinator act, and learn whether it could.

        Raises:
            EngineError: it could not; on every rank.
        """
        dist.all_reduce(torch.zeros(1))  # on the CPU: everybody has arrived
        words: list[str] = [""]
        if self._turns is not None:
            try:
                action(self._turns)
            except (EngineError, WrongTurn) as error:
                words[0] = str(error)
        dist.broadcast_object_list(words, src=0)
        if words[0]:
            raise EngineError(f"the servers' memory could not be moved: {words[0]}")
