"""Requests to end, by signal: noted when they arrive, and told apart from the same request sent once more.

A stop often reaches a process several times. Terminals, service managers and launchers signal every process that they
know, and a supervisor hands on what it received. So all signals within `AGAIN_AFTER_S` are one request. A signal after
that time is another one, and means that the process is to end at once.

Python runs a handler between two instructions of the main thread, which may wait for other ranks for minutes. So a
thread reads the signals from a pipe (`signal.set_wakeup_fd`) and knows when each of them came.

Imports little, for a command handles signals from its first lines on.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Ctrl-C; the end of a job; what Slurm sends before the end if asked to (`--signal=USR1@300`); a terminal that closes.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
AGAIN_AFTER_S = 3.0
ALL = 1 << 30  # requests tolerated by a process that asks for them itself
_RETRY_S = 0.05  # between two attempts to end what the main thread does
_UNWIND_S = 5.0  # for the main thread to notice that the process is to end at once


class StopRequested(KeyboardInterrupt):
    """Ends what the main thread does because of a signal; `exit_code` is 128 + the signal."""

    def __init__(self, signum: int, *, again: bool):
        if again:
            message = f"ended at once by another signal, {AGAIN_AFTER_S:g} s or more after {signal_name(signum)}"
        else:
            message = f"stopped by {signal_name(signum)}; there was nothing to save"
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequests:
    """What this process has been asked, while it handles signals.

    Attributes:
        signum: the first signal; 0 without one.
        since: when it came, on the monotonic clock; infinity without one.
        count: the number of requests.
        tolerated: how many requests are only noted. Each further one raises `StopRequested` in the main thread.
        on_first: called with the first signal, in whichever thread.
    """

    def __init__(self) -> None:
        self.tolerated = 0
        self.on_first: Callable[[int], None] | None = None
        self._before: dict[int, Any] = {}  # handlers to restore
        self._hook: Callable[[Any], Any] = sys.unraisablehook
        self._reader = self._writer = -1
        self._lock = threading.RLock()  # the handler may interrupt itself
        self._forget()

    def _forget(self) -> None:
        self.signum, self.count, self.since = 0, 0, float("inf")
        self._counted_at = float("-inf")
        self._due = False  # whether `StopRequested` is to be raised

    @contextlib.contextmanager
    def handled(self, *, tolerated: int) -> Iterator[None]:
        """A context in which signals are requests, of which so many are tolerated; for the main thread."""
        before, begins = self.tolerated, not self._before
        self.tolerated = tolerated
        try:
            if begins:
                self.install(tolerated=tolerated)
            yield
        finally:
            self.tolerated = before
            if begins:
                self._uninstall()

    def install(self, *, tolerated: int) -> None:
        """Handle signals until this process ends; for the main thread."""
        self._forget()
        self.tolerated = tolerated
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        for number in SIGNALS:
            # What a parent lets this process ignore, as nohup does, stays ignored; shells ignore SIGINT behind a "&".
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        with contextlib.suppress(RuntimeError):  # no more threads are allowed: the handler alone has to do
            threading.Thread(target=self._listen, args=(self._reader,), name="stop requests", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _uninstall(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = self._hook
        os.close(self._writer)  # which ends the thread
        self._forget()

    def _handle(self, _number: int, frame: types.FrameType | None) -> None:
        self._take(self._reader)
        if self._due and (frame is None or frame.f_code is not StopRequests._raise_again.__code__):
            self._due = False
            raise StopRequested(self.signum, again=self.count > 1)

    def _raise_again(self, ignored: Any) -> None:
        """Takes note when Python ignores that this process is to end: raised in a destructor or a weak reference's
        callback, an exception is only printed. Another thread then sees to it that it is raised again."""
        if not isinstance(ignored.exc_value, StopRequested):
            self._hook(ignored)
            return
        self._due = True
        with contextlib.suppress(OSError):
            os.write(self._writer, bytes([self.signum]))

    def _listen(self, reader: int) -> None:
        waiting = select.poll()
        waiting.register(reader, select.POLLIN)
        given_up_at = float("inf")
        while not waiting.poll(_RETRY_S * 1000 if self._due else None) or self._take(reader):
            if not self._due:
                given_up_at = float("inf")
                continue
            if self.count > 1:
                given_up_at = min(given_up_at, time.monotonic() + _UNWIND_S)
            if time.monotonic() > given_up_at:
                os.write(2, f"clipo: {StopRequested(self.signum, again=True)}\n".encode())
                os._exit(128 + self.signum)
            _thread.interrupt_main(self.signum)  # the handler may have run just before the signal was in the pipe
        os.close(reader)

    def _take(self, reader: int) -> bool:
        """Note the signals in the pipe; False once it is closed."""
        with self._lock:
            try:
                numbers = os.read(reader, 64)
            except BlockingIOError:  # the other thread has read them
                return True
            for number in numbers:
                if signal.getsignal(number) == self._handle:
                    self.note(number)
            return numbers != b""

    def note(self, signum: int) -> None:
        """Count a signal that has just come, unless it belongs to a request that was counted."""
        now = time.monotonic()
        if now - self._counted_at < AGAIN_AFTER_S:
            return
        self._counted_at = now
        self.count += 1
        self._due = self._due or self.count > self.tolerated
        if self.count == 1:
            self.signum, self.since = signum, now
            if self.on_first is not None:
                self.on_first(signum)


REQUESTS = StopRequests()  # of this process


def tolerated_at_start(words: Sequence[str]) -> int:
    """How many requests a command tolerates from its first line on: a rank ends with the others, whom it meets later.

    `words` is the command line without the program.
    """
    launched = "RANK" in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return int(launched and words[:1] in (["train"], ["eval"]))


def block() -> None:
    """Hold signals back until the program that this process becomes handles them; for a `preexec_fn`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def ignore() -> None:
    """Ignore signals from now on, when nothing is left that they could end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def report(request: KeyboardInterrupt) -> int:
    """Say on stderr what ended this process; returns its exit code."""
    print(f"clipo: {str(request) or 'stopped by SIGINT'}", file=sys.stderr, flush=True)
    return getattr(request, "exit_code", 128 + signal.SIGINT)


def asked_by(exit_code: int) -> int:
    """The signal at which a process has ended with this code, negative as `subprocess` gives it; 0 for other ends."""
    signum = exit_code - 128 if exit_code > 0 else -exit_code
    return signum if signum in SIGNALS else 0


def signal_name(number: int) -> str:
    """ "SIGTERM", or "signal 70" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
