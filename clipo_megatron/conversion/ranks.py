"""The processes that share a conversion: one, or the ranks that torchrun or srun started. They share a file system.

Ranks talk through a key-value store alone. Each beats there once a second; whoever falls silent, or says that it
failed, ends the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from clipo_megatron.conversion.plan import ConversionError

BEAT_S = 1.0
SILENCE_S = 60.0
MEET_S = 120.0
PART_S = 5.0

Item = TypeVar("Item")


class Ranks:
    """This process among those that share a conversion. Use it as a context manager.

    Args:
        environment: with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them; else it is alone.
        silence_s: after which a rank counts as lost.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, *, silence_s: float = SILENCE_S) -> None:
        self.world = int(environment.get("WORLD_SIZE", "1"))
        self.rank = int(environment.get("RANK", "0")) if self.world > 1 else 0
        self.silence_s = silence_s
        self.lost = ""  # why this conversion cannot go on, as seen from here
        self._store: Store | None = None
        self._own, self._seen = 0, {}
        self._end = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="ranks")

    def __enter__(self) -> Ranks:
        if self.world > 1:
            try:
                store, _, _ = next(rendezvous("env://", self.rank, self.world, timeout=timedelta(seconds=MEET_S)))
            except (RuntimeError, ValueError) as error:
                raise ConversionError(
                    f"rank {self.rank} did not meet the other {self.world - 1} within {MEET_S:.0f} s: {error}. Start "
                    "all of them with one launcher (torchrun, srun)"
                ) from error
            store.set_timeout(timedelta(seconds=self.silence_s))
            self._store = PrefixStore("conversion", store)
            self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None and not self.lost:
            self._part()
        self._end.set()
        if self._heart.is_alive():
            self._heart.join(BEAT_S + 5)

    @property
    def leads(self) -> bool:
        """Whether this is the process that prepares and finishes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part."""
        return items[self.rank :: self.world]

    def count(self, nbytes: int) -> None:
        """Let the others know how far this rank is."""
        self._own = nbytes

    @property
    def total(self) -> int:
        """Bytes that all ranks have counted, a second ago or less."""
        return self._own + sum(count for rank, (count, _) in self._seen.items() if rank != self.rank)

    def fail(self, reason: str) -> None:
        """Tell the others that this rank ends."""
        if self._store is not None and not self.lost:
            try:
                self._store.set("failed", f"rank {self.rank}: {reason}")
            except RuntimeError:
                return  # nobody is there to hear it

    def meet(self, name: str, stop: Callable[[], None] = lambda: None) -> None:
        """Wait until all ranks have come to this point; `stop` raises to leave the wait.

        Raises:
            ConversionError: a rank failed or fell silent.
        """
        if self._store is None:
            return
        self._guarded(lambda store: store.set(f"{name}/{self.rank}", "here"))
        missing = set(range(self.world))
        while missing:
            self.raise_if_lost()
            stop()
            missing -= {rank for rank in missing if self._guarded(lambda store, r=rank: store.check([f"{name}/{r}"]))}
            if missing:
                time.sleep(0.05)

    def raise_if_lost(self) -> None:
        """Raise a ConversionError when the others cannot go on."""
        if self.lost:
            raise ConversionError(f"{self.lost}. The same command goes on from what is done")

    def _part(self) -> None:
        """Rank 0 may hold the store, so it goes last."""
        deadline = time.monotonic() + PART_S
        try:
            self._store.set(f"left/{self.rank}", "gone")
            left = [f"left/{rank}" for rank in range(self.world)]
            while self.leads and time.monotonic() < deadline and not self._store.check(left):
                time.sleep(0.05)
        except RuntimeError:
            return  # the launcher's store went first

    def _guarded(self, ask: Callable[[Store], object]) -> object:
        try:
            return ask(self._store)
        except RuntimeError as error:
            self.lost = self.lost or f"the ranks' store is gone, and with it rank 0 or the launcher ({error})"
            self.raise_if_lost()
            raise

    def _beat(self) -> None:
        started, beats = time.monotonic(), 0
        self._seen = {rank: (0, started) for rank in range(self.world)}
        heard: dict[int, bytes] = {}
        while not self._end.wait(BEAT_S) and not self.lost:
            beats += 1
            try:
                self._store.set(f"beat/{self.rank}", f"{beats} {self._own}")
                if self._store.check(["failed"]):
                    self.lost = self._store.get("failed").decode()
                    return
                for rank in range(self.world):
                    if rank != self.rank and self._store.check([f"beat/{rank}"]):
                        beat = self._store.get(f"beat/{rank}")
                        if beat != heard.get(rank):
                            heard[rank] = beat
                            self._seen[rank] = (int(beat.split()[1]), time.monotonic())
            except RuntimeError as error:
                self.lost = f"the ranks' store is gone, and with it rank 0 or the launcher ({error})"
                return
            silent = [
                rank
                for rank, (_, at) in self._seen.items()
                if rank != self.rank and time.monotonic() - at > self.silence_s
            ]
            if silent:
                self.lost = f"rank {silent[0]} of {self.world} has not been heard of for {self.silence_s:.0f} s"
