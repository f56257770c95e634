"""The prompts of each step, in shuffled epochs, with a position that a checkpoint can hold."""

from __future__ import annotations

import hashlib
from typing import Any

from clipo_megatron.data.sources import DataError


class PromptSampler:
    """Walks through n prompts epoch after epoch, each epoch in its own order, and drops none.

    A batch may span two epochs; then it can hold a prompt twice. The order of an epoch is a function of (seed, epoch),
    equal on every machine and in every version.
    """

    def __init__(self, n: int, prompts_per_step: int, *, seed: int = 0, shuffle: bool = True):
        """Start at the first prompt of epoch 0.

        Raises:
            DataError: n or prompts_per_step is less than 1.
        """
        if n < 1 or prompts_per_step < 1:
            raise DataError(f"cannot draw {prompts_per_step} prompts per step out of {n}. Both must be at least 1.")
        self.n = n
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.offset = 0  # number of prompts of this epoch that were drawn
        self._order = self._permutation(0)

    @property
    def drawn(self) -> int:
        """The number of prompts drawn so far, in all epochs."""
        return self.epoch * self.n + self.offset

    def next(self) -> list[int]:
        """Indices of the next step's prompts, each in [0, n)."""
        return self.draw(self.prompts_per_step)

    def draw(self, count: int) -> list[int]:
        """Indices of the next `count` prompts, each in [0, n)."""
        batch: list[int] = []
        while len(batch) < count:
            taken = self._order[self.offset : self.offset + count - len(batch)]
            batch += taken
            self.offset += len(taken)
            if self.offset == self.n:
                self.epoch, self.offset = self.epoch + 1, 0
                self._order = self._permutation(self.epoch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, with the data and order that it belongs to."""
        return {"epoch": self.epoch, "offset": self.offset, "n": self.n, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; `prompts_per_step` may have changed.

        Raises:
            DataError: the position belongs to other data or another order.
        """
        for name in ("n", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"the saved position belongs to {name} = {state[name]}, and now {name} = {getattr(self, name)}: "
                    "the run cannot be resumed. Restore the data and settings, or choose a new train.output."
                )
        self.epoch, self.offset = int(state["epoch"]), int(state["offset"])
        self._order = self._permutation(self.epoch)

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.n))
        # Sorted by a hash: unlike the shuffle of a random generator, no release of a library can change it.
        salt = f"{self.seed}/{epoch}/"
        return sorted(
            range(self.n), key=lambda index: hashlib.blake2b(f"{salt}{index}".encode(), digest_size=8).digest()
        )
