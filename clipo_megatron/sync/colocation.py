"""The order in which servers and trainer take turns with the memory of GPUs that they share."""

from __future__ import annotations

from enum import Enum

from clipo_megatron.rollout.engine import Engine, Memory


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
    cache after that. A new run starts with servers that have everything; they are asked for room first, because the
    trainer's first push comes before the first rollout.
    """

    def __init__(self, engine: Engine):
        self.engine, self.turn = engine, Turn.generate

    def before_training(self) -> None:
        """Nothing is in flight; the servers give back what they can."""
        self._leave(Turn.generate, "before_training")
        self.engine.release_memory(Memory.kv_cache, Memory.weights)
        self.turn = Turn.train

    def before_push(self) -> None:
        """The servers take the memory of their weights again; its contents are to be pushed."""
        self._leave(Turn.train, "before_push")
        self.engine.restore_memory(Memory.weights)
        self.turn = Turn.update

    def after_push(self) -> None:
        """The servers have weights; they take the memory of their cache again and can generate."""
        self._leave(Turn.update, "after_push")
        self.engine.restore_memory(Memory.kv_cache)
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
