"""Starts ranks on this machine if no launcher did, watches them, and ends them together.

Imports no torch, and neither do the checks of a configuration, so that the supervising process stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.runtime.heartbeat import HEARTBEAT_LOST
from clipo_megatron.runtime.launcher_env import CHECKED
from clipo_megatron.runtime.ports import LOOPBACK, free_port
from clipo_megatron.runtime.stop_requests import (
    AGAIN_AFTER_S,
    ALL,
    REQUESTS,
    StopRequests,
    asked_by,
    block,
    signal_name,
)

TAIL_LINES = 20


class RankError(RuntimeError):
    """A rank failed; the message names it, says how it ended, and shows the end of its log."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class RankCommand:
    """How to start one rank. Without a log it writes where the parent process writes."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # added to the parent's
    log: Path | None = None


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_commands(
    arguments: Sequence[str], ranks: int, *, logs: Path, environment: Mapping[str, str] = os.environ
) -> list[RankCommand]:
    """Commands of ranks that rendezvous on this machine; all but rank 0 write to `logs`.

    Raises:
        ConfigError: there are far more ranks than cores.
    """
    if ranks > (limit := max(16, 4 * cores())):
        raise ConfigError(
            f"the layout needs {ranks} ranks, and this machine has {cores()} cores (at most {limit} ranks are started "
            "here). Start them on several machines with srun or torchrun, or lower layout.tp, pp or dp."
        )
    shared = {
        CHECKED: "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(max(1, cores() // ranks))),
        "PYTHONUNBUFFERED": "1",  # so that the log of a killed rank is complete
        "PYTHONFAULTHANDLER": "1",  # so that it shows where the rank crashed
    }
    return [
        RankCommand(
            arguments,
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            None if rank == 0 else logs / f"rank{rank}.log",
        )
        for rank in range(ranks)
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def supervise(
    commands: Sequence[RankCommand],
    *,
    grace_s: float = 10.0,
    settle_s: float = 1.0,
    stop_deadline_s: float = 3600.0,
    requests: StopRequests = REQUESTS,
) -> int:
    """Start one process for each command and wait for all. No rank outlives a failure of another, or this process.

    When a rank fails, the others have `settle_s` to fail too, then get SIGTERM, and SIGKILL after `grace_s`. A request
    to end is handed on to the ranks, which may take `stop_deadline_s`; a second request kills them. A rank that was
    asked directly, and has ended for that reason, has told the others; they have `grace_s` to end as well. Must be
    called from the main thread, because it handles signals.

    Returns:
        0 if all ranks succeed; 128 + the signal's number if this process or a rank was asked to end; 2 if rank 0 has
        reported an error of the user itself.

    Raises:
        RankError: a rank failed; has its number, its exit code or signal, and the last lines of its log.
    """
    return _Supervision(commands, grace_s, settle_s, stop_deadline_s, requests).run()


def supervise_again(
    start: Callable[[int], int],
    *,
    restarts: int,
    progress: Callable[[], object],
    say: Callable[[str], None] = _say,
    requests: StopRequests = REQUESTS,
) -> int:
    """Start ranks again after a failure, until they succeed, are asked to end, or fail too often.

    Args:
        start: starts ranks and waits for them, as `supervise` does; gets the number of the attempt.
        restarts: how many restarts in a row may fail without progress.
        progress: returns a value that changes whenever an attempt has got further than those before.
        say: prints a line about each restart.
        requests: asked to end, this process starts no ranks again.

    Raises:
        RankError: that of the last attempt.
    """
    attempt = failures = 0
    reached = progress()
    with requests.handled(tolerated=ALL):
        while True:
            try:
                return start(attempt)
            except RankError as error:
                before, reached = reached, progress()
                failures = failures + 1 if reached == before else 1
                if failures > restarts or requests.count:
                    raise
                attempt += 1
                say(f"clipo: {error}\nStarting the ranks again (restart {attempt}, faults.max_restarts = {restarts}).")


class _Supervision:
    def __init__(
        self,
        commands: Sequence[RankCommand],
        grace_s: float,
        settle_s: float,
        stop_deadline_s: float,
        requests: StopRequests,
    ):
        self.commands = commands
        self.grace_s, self.settle_s, self.stop_deadline_s = grace_s, settle_s, stop_deadline_s
        self.requests = requests
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log_starts: list[int] = []
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.running: set[int] = set()
        self.failed: list[int] = []  # ranks that failed by themselves, first failure first
        self.asked = 0  # the signal at which the first rank has ended; what other ranks then meet is its consequence

    def run(self) -> int:
        with self.requests.handled(tolerated=ALL):
            if self.requests.count:
                _say(f"{signal_name(self.requests.signum)}: the ranks are not started.")
                return 128 + self.requests.signum
            try:
                self._start()
                self._wait()
            finally:
                self._end()
            return self._outcome()

    def _start(self) -> None:
        bind = dies_with_this_process()

        def prepare() -> None:
            block()  # a request that comes before the rank can note it waits until it can
            if bind is not None:
                bind()

        for command in self.commands:
            if command.log:
                command.log.parent.mkdir(parents=True, exist_ok=True)
            with open(command.log, "ab") if command.log else open(os.devnull) as output:
                self.log_starts.append(output.tell())
                self.processes.append(
                    subprocess.Popen(
                        command.arguments,
                        env={**os.environ, **command.environment},
                        stdin=subprocess.DEVNULL,
                        stdout=output if command.log else None,
                        stderr=output if command.log else None,
                        process_group=0,  # so that Ctrl-C reaches this process alone, which hands it on
                        preexec_fn=prepare,
                    )
                )
        self.running = set(range(len(self.processes)))
        for rank in self.running:  # one thread waits for each, so that ends arrive in order
            threading.Thread(target=self._watch, args=(rank,), daemon=True).start()

    def _watch(self, rank: int) -> None:
        self.processes[rank].wait()
        self.ended.put(rank)

    def _wait(self) -> None:
        """Wait until all ranks have ended, or have to be ended."""
        deadline, handed_on = float("inf"), False
        while self.running:
            if time.monotonic() > deadline:
                if not self.failed and not self.asked:
                    _say(f"The ranks did not end within {self.stop_deadline_s:.0f} s of the signal; ending them.")
                return
            try:
                rank = self.ended.get(timeout=0.1)
            except queue.Empty:
                rank = None
            if rank is not None:
                self.running.discard(rank)
                deadline = min(deadline, time.monotonic() + self._patience_after(rank))
            if self.requests.count > 1:
                _say("Killing all ranks.")
                self._kill()
                return
            if self.requests.count and not handed_on and not self.failed and not self.asked:
                handed_on = True
                name = signal_name(self.requests.signum)
                _say(f"{name}: the ranks end their step and save. A signal after {AGAIN_AFTER_S:g} s kills them.")
                self._signal(self.requests.signum)
                deadline = time.monotonic() + self.stop_deadline_s

    def _patience_after(self, rank: int) -> float:
        """How long the others may go on after the end of a rank, which is judged here."""
        code = self.processes[rank].returncode
        if code == 0 or self.asked or self.failed[1:]:
            return float("inf")
        self.asked = 0 if self.failed else asked_by(code)
        if self.asked:
            return 3 * self.grace_s  # all have agreed to end, and what they saved is there
        self.failed.append(rank)
        return self.settle_s

    def _signal(self, number: int) -> None:
        """Send a signal to every running rank."""
        for rank in self.running:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.processes[rank].pid, number)

    def _kill(self) -> None:
        """Kill every rank, and the child processes also of ranks that have ended."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _end(self) -> None:
        """End running ranks, by SIGTERM first, and kill what is left."""
        if self.requests.count < 2:
            self._signal(signal.SIGTERM)
            self._await_ends(self.grace_s, or_request=True)
        self._kill()
        self._await_ends(10.0)

    def _await_ends(self, patience_s: float, *, or_request: bool = False) -> None:
        deadline = time.monotonic() + patience_s
        while self.running and (left := deadline - time.monotonic()) > 0:
            if or_request and self.requests.count > 1:
                return
            with contextlib.suppress(queue.Empty):
                self.running.discard(self.ended.get(timeout=min(left, 0.1)))

    def _outcome(self) -> int:
        codes = [process.returncode for process in self.processes]
        if self.failed:
            first = self.failed[0]
            if codes[first] == 2 and codes[0] == 2:
                return 2  # an error of the user, the same on every rank, which rank 0 has reported
            raise RankError(self._report(first), exit_code=_as_exit_code(codes[first]))
        asked = self.requests.signum or self.asked
        if asked and any(code != 0 for code in codes):  # None: still running after SIGKILL
            return 128 + asked
        return 0

    def _report(self, rank: int) -> str:
        code = self.processes[rank].returncode
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        others = "; the others were stopped" if len(self.commands) > 1 else ""
        message = f"Rank {rank} of {len(self.commands)} {how}{others}."
        if code == HEARTBEAT_LOST:
            message += " It missed the heartbeat of another rank, as its last lines say."
        if code == -signal.SIGKILL:
            message += (
                " The system may have run out of memory: lower layout.max_tokens_per_microbatch or rollout.batch_size."
            )
        log = self.commands[rank].log
        if log is None:
            return message + " Its messages are above."
        with log.open("rb") as written:
            written.seek(self.log_starts[rank])
            lines = written.read()[-64_000:].decode(errors="replace").splitlines()[-TAIL_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
        return f"{message} The end of {log}:\n{tail}"


def _as_exit_code(code: int) -> int:
    return code if code > 0 else 128 - code


def dies_with_this_process() -> Callable[[], None] | None:
    """A `preexec_fn` with which the kernel kills a child process when this process dies; None outside Linux."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent, death_signal = ctypes.CDLL(None).prctl, os.getpid(), 1  # PR_SET_PDEATHSIG

    def bind() -> None:
        prctl(death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return bind
