"""The heartbeat of ranks: every rank shows every few seconds that it is alive, and in which phase of its work it is.

A rank without a heartbeat for too long is named, by rank 0, or by the others if it is rank 0, and all ranks end. If
rank 0 keeps the ranks' store, the others notice that the store does not answer. When a rank stays in one phase for too
long, every rank prints its stacks. All this happens in threads, so a main thread that waits for another rank still
sends heartbeats.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

HEARTBEAT_LOST = 70  # exit code of a rank that ends because another rank's heartbeat is missing
_INTERVAL_S = 5.0
_END, _STACKS, _STOP = "end", "stacks", "stop"  # keys of the store


class StopFlag(Protocol):
    """Whether this process was asked to end; `clipo_megatron.training.stop_signal.StopSignal` is one."""

    signum: int  # the signal; 0 without one

    def set_by_other_rank(self, signum: int) -> None: ...


@dataclass(frozen=True)
class _CurrentPhase:
    name: str
    number: int  # counts phases; the same on all ranks
    since: float


@dataclass
class _LastBeat:
    """The last heartbeat read of a rank, and when it changed."""

    beat: bytes = b""
    at: float = field(default_factory=time.monotonic)


class Heartbeat:
    """Sends this rank's heartbeat, and watches those of the others.

    Args:
        rank: the rank of this process.
        world: number of ranks.
        store: shared by all ranks, over connections that nobody else uses; None with one rank.
        heartbeat_timeout_s: time without a heartbeat after which a rank counts as lost. It takes a few seconds more
            until all ranks have ended.
        phase_timeout_s: time in one phase after which stacks are printed, and again after each doubling of it.
        remedy: what the user can do when a rank is lost; the end of the message.
        end: called with the exit code when a rank is lost; leaves the process.
        stop: passed on to the other ranks within seconds once it is set here.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Any,
        *,
        heartbeat_timeout_s: float,
        phase_timeout_s: float = float("inf"),
        remedy: str = "Start the command again",
        end: Callable[[int], object] = os._exit,
        stop: StopFlag | None = None,
    ) -> None:
        self.rank, self.world, self.store = rank, world, store
        self.heartbeat_timeout_s, self.phase_timeout_s, self.remedy = heartbeat_timeout_s, phase_timeout_s, remedy
        self._end, self._stop_flag = end, stop
        self.interval_s = min(_INTERVAL_S, heartbeat_timeout_s / 4)
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._phase = _CurrentPhase("start", 0, time.monotonic())
        self._stopped = threading.Event()
        self._answered = time.monotonic()  # when the store last answered
        self._disconnected: float | None = None  # since when the store's connection is broken
        self._last = [_LastBeat() for _ in range(world)]
        self._stacks_after = 1  # in units of phase_timeout_s
        self._printed = {""}  # reasons for which stacks were printed; this rank may find one and hear of it too
        self._printing = threading.Lock()

    def start(self) -> None:
        """Begin to send and watch. A rank is watched from its first heartbeat on."""
        if self.store is not None:
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._watch, name="heartbeat watch", daemon=True).start()

    def phase(self, name: str) -> None:
        """Enter a phase, and begin to count the time in it."""
        self._stacks_after = 1
        self._phase = _CurrentPhase(name, self._phase.number + 1, time.monotonic())

    def stop(self) -> None:
        """Stop sending and watching. Idempotent."""
        self._stopped.set()

    # --- threads -----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Exchange heartbeats through the store. If the store hangs, this thread does too, and the other notices."""
        number = 0
        while not self._stopped.is_set():
            number += 1
            phase = self._phase
            beat = f"{number}|{self._process}|{phase.name}|{time.monotonic() - phase.since:.0f}"
            try:
                self.store.set(f"sign/{self.rank}", beat)
                ended = self.store.get(_END).decode() if self.store.check([_END]) else ""
                if self._stop_flag is not None:
                    self._share_stop(self._stop_flag)
                stacks = self.store.get(_STACKS).decode() if self.store.check([_STACKS]) else ""
                # Rank 0 watches all ranks, and all watch rank 0.
                keys = {rank: f"sign/{rank}" for rank in (range(self.world) if self.rank == 0 else (0,))}
                beats = {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}
            except Exception:  # the client may raise anything when its server is gone
                self._disconnected = self._disconnected or time.monotonic()
                self._stopped.wait(self.interval_s)
                continue
            self._answered = time.monotonic()
            if self._stopped.is_set():
                return
            self._print_stacks(stacks)
            if ended:
                self._end_process(ended)
            elif lost := self._lost_ranks(beats):
                self.store.set(_END, lost)
                self._end_process(lost)
            self._stopped.wait(self.interval_s)

    def _share_stop(self, stop: StopFlag) -> None:
        if self.store.check([_STOP]):
            stop.set_by_other_rank(int(self.store.get(_STOP)))
        elif stop.signum:
            self.store.set(_STOP, str(stop.signum))

    def _watch(self) -> None:
        """Watch the clock: the time in this rank's phase, and the time since the store answered."""
        last = time.monotonic()
        while not self._stopped.wait(self.interval_s):
            now = time.monotonic()
            if now - last > 3 * self.interval_s + 1.0:  # this process itself was suspended
                self._answered = now
                for each in self._last:
                    each.at = now
            last = now
            phase = self._phase
            if now - phase.since > self._stacks_after * self.phase_timeout_s:
                text = f"a rank has been in phase {phase.name!r} (number {phase.number}) for"
                self._ask_for_stacks(f"{text} {self._stacks_after * self.phase_timeout_s:g} s")
                self._stacks_after *= 2
            if self.store is None:
                continue
            # A broken connection means that rank 0's process is gone or ending, as this one may be too.
            disconnected = self._disconnected and now - self._disconnected > self.interval_s
            if disconnected or now - self._answered > self.heartbeat_timeout_s:
                self._end_process(
                    f"rank 0, which keeps the ranks' store, has sent no heartbeat for {now - self._answered:.0f} s"
                    + (": its process is gone" if self._disconnected else "")
                )

    # --- findings ----------------------------------------------------------------------------------------------------

    def _lost_ranks(self, beats: dict[int, bytes]) -> str:
        """Which ranks have sent no heartbeat for too long, in words; empty if none."""
        now, lost = time.monotonic(), []
        for rank, beat in beats.items():
            last = self._last[rank]
            if beat != last.beat:
                self._last[rank] = _LastBeat(beat)
            elif now - last.at > self.heartbeat_timeout_s:
                _, process, phase, seconds = beat.decode().split("|")
                lost.append(
                    f"rank {rank} of {self.world} ({process}) has sent no heartbeat for {now - last.at:.0f} s; it had "
                    f"been in phase {phase!r} for {seconds} s"
                )
        return "; ".join(lost)

    def _end_process(self, reason: str) -> None:
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._print_stacks("the ranks end")
        print(
            f"clipo: rank {self.rank}: {reason} (the limit is {self.heartbeat_timeout_s:g} s). All ranks end. "
            f"{self.remedy}",
            file=sys.stderr,
            flush=True,
        )
        self._end(HEARTBEAT_LOST)

    def _ask_for_stacks(self, why: str) -> None:
        with contextlib.suppress(Exception):  # the stacks of this rank are printed in any case
            if self.store is not None:
                self.store.set(_STACKS, why)
        self._print_stacks(why)

    def _print_stacks(self, why: str) -> None:
        with self._printing:
            if why in self._printed:
                return
            self._printed.add(why)
            print(
                f"rank {self.rank} of {self.world} ({self._process}): {why}; its stacks:", file=sys.stderr, flush=True
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
