"""Deadlines by progress: a wait fails when nothing works any more, not when a busy machine takes long.

Progress is CPU time. Every process that a test session starts inherits a mark in its environment, by which its CPU time
is found in /proc wherever the process was adopted to.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

STALL_S = 120.0  # without progress, after which a wait fails
TEST_STALL_S = 240.0  # the same for a whole test
TEST_CPU_S = 1800.0  # that a test may use: the deadline of a loop that never ends
SOAK_CPU_S = 4 * 3600.0
SLEEPY = 0.05  # share of a core; a process that uses less is only polling
INTERVAL_S = 2.0  # between two looks at /proc

MARK = "CLIPO_TEST_SESSION"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def begin_session() -> None:
    """Mark the processes that are started from now on as this session's."""
    os.environ[MARK] = uuid.uuid4().hex


def marked(mark: str) -> list[int]:
    """Living processes that had `mark` in their environment when they started."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if mark.encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
            except OSError:
                continue
    return found


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of a process, and of those that it has waited for; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    return sum(map(int, fields[11:13])) / _TICKS_PER_S, sum(map(int, fields[13:15])) / _TICKS_PER_S


class Progress:
    """Tells for how long processes have not worked.

    Args:
        pids: names the processes to look at; by default all that this session has started, without this one.
    """

    def __init__(self, pids: Callable[[], Iterable[int]] | None = None):
        self._pids = pids or (lambda: [pid for pid in marked(os.environ[MARK]) if pid != os.getpid()])
        self._seen: dict[int, tuple[float, float]] | None = None
        self._looked = self._worked = time.monotonic()
        self.spent = 0.0  # CPU seconds since the first look

    def idle_s(self) -> float:
        """Seconds since the processes last worked; it looks at most every INTERVAL_S."""
        now = time.monotonic()
        if now - self._looked >= INTERVAL_S:
            seen = {pid: cpu_seconds(pid) for pid in self._pids()}
            before = seen if self._seen is None else self._seen
            used = [
                sum(max(0.0, seconds[which] - before.get(pid, (0.0, 0.0))[which]) for pid, seconds in seen.items())
                for which in (0, 1)
            ]
            if self._seen is None or sum(used) > SLEEPY * (now - self._looked):
                self._worked = now
            self.spent += used[0]
            self._seen, self._looked = seen, now
        return now - self._worked


def wait_until(
    condition: Callable[[], object],
    what: str,
    pids: Callable[[], Iterable[int]] | None = None,
    *,
    stall_s: float = STALL_S,
    story: Callable[[], str] = str,
) -> None:
    """Poll until the condition holds.

    Args:
        what: what is waited for, for the message.
        pids: returns the ids of the processes that bring it about; by default all that this session has started.
        stall_s: ends the wait once they have not worked for so long.
        story: what has happened so far, for the message.

    Raises:
        AssertionError: nothing works any more, and the condition does not hold.
    """
    progress = Progress(pids)
    while True:
        started = time.monotonic()
        if condition():
            return
        cost = time.monotonic() - started
        idle = progress.idle_s()
        assert idle < stall_s, f"nothing has worked for {idle:.0f} s while this was waited for: {what}\n{story()}"
        time.sleep(max(0.002, 5 * cost))  # conditions that cost much are looked at less often


def end_of(process: subprocess.Popen, what: str = "the end of a process") -> int:
    """Wait for a process that the test has started, and return its exit code; kill it when it stands still."""
    try:
        wait_until(lambda: process.poll() is not None, what)
    except BaseException:
        process.kill()
        raise
    return process.returncode


class Watchdog:
    """A pytest plugin that fails a test which stands still, or loops for ever; its threads' stacks are printed."""

    def __init__(self, config: pytest.Config):
        self._config = config
        self._item: pytest.Item | None = None
        self._reason = ""
        self._main = threading.main_thread().ident
        signal.signal(signal.SIGRTMIN, self._fail)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._item, self._reason = item, ""
        try:
            return (yield)
        finally:
            self._item = None

    def _fail(self, *_: object) -> None:
        if self._item is not None:
            pytest.fail(self._reason)

    def _watch(self) -> None:
        item, progress = None, Progress()
        while True:
            time.sleep(INTERVAL_S)
            if self._item is not item:
                item, progress = self._item, Progress(lambda: [os.getpid(), *marked(os.environ[MARK])])
            if item is None:
                continue
            budget = SOAK_CPU_S if item.get_closest_marker("soak") else TEST_CPU_S
            idle = progress.idle_s()
            if idle > TEST_STALL_S:
                self._end(item, f"nothing has worked for {idle:.0f} s")
            elif progress.spent > budget:
                self._end(item, f"the test has used {budget:.0f} s of CPU time")

    def _end(self, item: pytest.Item, reason: str) -> None:
        """Raise in the main thread; where that does not react either, end the process."""
        self._reason = reason
        signal.pthread_kill(self._main, signal.SIGRTMIN)
        time.sleep(60.0)
        if self._item is item:
            if capture := self._config.pluginmanager.getplugin("capturemanager"):
                capture.suspend_global_capture(in_=True)
            print(f"\n{item.nodeid}: {reason}, and the test does not end", file=sys.__stderr__)
            faulthandler.dump_traceback(file=sys.__stderr__)
            sys.__stderr__.flush()
            os._exit(1)
