"""Signs of life: every rank gives one each few seconds, and says what it does.

A rank that gives none for too long is named, by rank 0, or by the others if it is rank 0, and all end.
Where rank 0 keeps the ranks' store, it is missed for not answering. A rank that does not come out of a phase makes
every rank print its stacks. Threads do all this: a main thread that waits for another rank for ever gives signs too.

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

FROZEN = 70  # exit code of a rank that ends because another one gives no sign of life
_EVERY_S = 5.0
_END, _STACKS, _STOP = "end", "stacks", "stop"


class Stop(Protocol):
    """A request to end."""

    signum: int  # 0: none

    def hear_of(self, signum: int) -> None:
        """That a rank got a signal."""


@dataclass(frozen=True)
class _CurrentPhase:
    name: str
    number: int  # of phases so far; the same on all ranks
    since: float


@dataclass
class _Seen:
    """What was last read of a rank."""

    sign: bytes = b""
    at: float = field(default_factory=time.monotonic)


class Heartbeat:
    """This rank's sign of life, and its eye on the others'.

    Args:
        rank: of this process.
        world: number of ranks.
        store: that all ranks share, with connections of its own (a clone); None with one rank.
        heartbeat_timeout_s: without a sign, after which a rank is given up; a few seconds more pass until all
            have ended.
        phase_timeout_s: in one phase, after which stacks are printed; again after twice the time.
        end: leaves the process, with an exit code.
        stop: that a rank was asked to end; others hear of it within seconds.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Any,
        *,
        heartbeat_timeout_s: float,
        phase_timeout_s: float,
        end: Callable[[int], object] = os._exit,
        stop: Stop | None = None,
    ) -> None:
        self.rank, self.world, self.store = rank, world, store
        self.heartbeat_timeout_s, self.phase_timeout_s, self._end, self._stop = (
            heartbeat_timeout_s,
            phase_timeout_s,
            end,
            stop,
        )
        self.every_s = min(_EVERY_S, heartbeat_timeout_s / 4)
        self._place = f"process {os.getpid()} on {socket.gethostname()}"
        self._phase = _CurrentPhase("start", 0, time.monotonic())
        self._left = threading.Event()
        self._answered = time.monotonic()  # the store
        self._lost: float | None = None  # since when the store's connection is
        self._seen = [_Seen() for _ in range(world)]
        self._asked = 1  # times phase_timeout_s, after which stacks are asked for next
        self._printed = ""

    def start(self) -> None:
        """Give signs from now on. A rank is looked for once it has given one."""
        if self.store is not None:
            threading.Thread(target=self._beat, name="signs of life", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def phase(self, name: str) -> None:
        """What this rank does from now on."""
        self._asked = 1
        self._phase = _CurrentPhase(name, self._phase.number + 1, time.monotonic())

    def leave(self) -> None:
        """Neither give signs nor look for them any more. Idempotent."""
        self._left.set()

    # --- threads -----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Talk to the store. A store that is frozen answers nothing, which the other thread notices."""
        number = 0
        while not self._left.is_set():
            number += 1
            phase = self._phase
            sign = f"{number}|{self._place}|{phase.name}|{time.monotonic() - phase.since:.0f}"
            try:
                self.store.set(f"sign/{self.rank}", sign)
                ended = self.store.get(_END).decode() if self.store.check([_END]) else ""
                if self._stop is not None:
                    self._pass_on(self._stop)
                stacks = self.store.get(_STACKS).decode() if self.store.check([_STACKS]) else ""
                # Rank 0 looks at all, and all look at rank 0.
                keys = {rank: f"sign/{rank}" for rank in (range(self.world) if self.rank == 0 else (0,))}
                signs = {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}
            except Exception:  # whatever a client raises whose server is gone
                self._lost = self._lost or time.monotonic()
                self._left.wait(self.every_s)
                continue
            self._answered = time.monotonic()
            if self._left.is_set():
                return
            if stacks not in ("", self._printed):
                self._print_stacks(stacks)
            if ended:
                self._should_cancel(ended)
            elif frozen := self._frozen(signs):
                self.store.set(_END, frozen)
                self._should_cancel(frozen)
            self._left.wait(self.every_s)

    def _pass_on(self, stop: Stop) -> None:
        if self.store.check([_STOP]):
            stop.hear_of(int(self.store.get(_STOP)))
        elif stop.signum:
            self.store.set(_STOP, str(stop.signum))

    def _watch(self) -> None:
        """Look at clocks: at this rank's phase, and at the time since the store answered."""
        last = time.monotonic()
        while not self._left.wait(self.every_s):
            now = time.monotonic()
            if now - last > 3 * self.every_s + 1.0:  # it was this process that stood still
                self._answered = now
                for seen in self._seen:
                    seen.at = now
            last = now
            phase = self._phase
            if now - phase.since > self._asked * self.phase_timeout_s:
                text = f"a rank has been in phase {phase.name!r} (number {phase.number}) for"
                self._ask_for_stacks(f"{text} {self._asked * self.phase_timeout_s:g} s")
                self._asked *= 2
            if self.store is None:
                continue
            # A connection that broke tells that the process is gone, or on its way out, as this one may be.
            if (self._lost and now - self._lost > self.every_s) or now - self._answered > self.heartbeat_timeout_s:
                spent = now - self._answered
                self._should_cancel(
                    f"rank 0, which keeps the ranks' store, has given no sign of life for {spent:.0f} s"
                    + (": its process is gone" if self._lost else "")
                )

    # --- findings ----------------------------------------------------------------------------------------------------

    def _frozen(self, signs: dict[int, bytes]) -> str:
        """Which rank has been silent for too long; empty if none has."""
        now, silent = time.monotonic(), []
        for rank, sign in signs.items():
            seen = self._seen[rank]
            if sign != seen.sign:
                self._seen[rank] = _Seen(sign)
            elif now - seen.at > self.heartbeat_timeout_s:
                _, place, phase, spent = sign.decode().split("|")
                silent.append(
                    f"rank {rank} of {self.world} ({place}) has given no sign of life for {now - seen.at:.0f} s; then "
                    f"it had been in phase {phase!r} for {spent} s"
                )
        return "; ".join(silent)

    def _should_cancel(self, reason: str) -> None:
        if self._left.is_set():
            return
        self._left.set()
        self._print_stacks("the attempt ends")
        print(
            f"clipo: rank {self.rank}: {reason} (faults.heartbeat_timeout_s = {self.heartbeat_timeout_s:g}). "
            "The attempt ends; the same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._end(FROZEN)

    def _ask_for_stacks(self, why: str) -> None:
        with contextlib.suppress(Exception):  # a store that does not answer is another matter
            if self.store is not None:
                self.store.set(_STACKS, why)
        self._print_stacks(why)

    def _print_stacks(self, why: str) -> None:
        self._printed = why
        print(f"rank {self.rank} of {self.world} ({self._place}): {why}; its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
