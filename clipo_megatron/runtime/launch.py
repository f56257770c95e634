"""Tells whether this process is a rank, and starts ranks on this machine if no launcher did.

A rank is started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK), by srun (SLURM_PROCID and the step's number of tasks), or
by `supervise`, which sets torchrun's variables. Imports no torch, and neither do the checks of a configuration, so that
the supervising process stays small.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.runtime import slurm_env as slurm
from clipo_megatron.runtime.heartbeat import HEARTBEAT_LOST
from clipo_megatron.runtime.ports import LOOPBACK, PORTS, free_port

TAIL_LINES = 20
_CHECKED = "CLIPO_CHECKED"  # set for ranks whose parent has checked what they read


class RankError(RuntimeError):
    """A rank failed; the message names it, says how it ended, and shows the end of its log."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Launch:
    """Rank numbers of this process."""

    rank: int
    world: int
    local_rank: int


@dataclass(slots=True)
class RankCommand:
    """How to start one rank. Without a log it writes where the parent process writes."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # added to the parent's
    log: Path | None = None


def from_environment(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The rank that torchrun or srun gave this process; None if there is no launcher.

    A batch script or the shell of an allocation is no rank: only srun sets the step's number of tasks.

    Raises:
        ConfigError: the variables contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        if environment["SLURM_STEP_NUM_TASKS"] == "1":
            return None  # one task, `srun clipo train`, which may start local ranks of its own
    else:
        return None
    values = [environment.get(name, "0") for name in names]
    if not all(value.isdigit() for value in values) or not int(values[0]) < int(values[1]):
        given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ConfigError(
            f"the launcher's variables contradict each other: {given}. Start under torchrun or srun, or unset them."
        )
    return Launch(*map(int, values))


def export_environment(launch: Launch, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that `torch.distributed` reads, where absent: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

    MASTER_ADDR is the first host of a Slurm step, and MASTER_PORT is derived from the ids of job and step; jobs of
    `clipo submit` need no port (see rendezvous.py). A single rank uses this machine.

    Raises:
        ConfigError: there are several ranks and no rendezvous address, or its host cannot be resolved.
    """
    environment.setdefault("RANK", str(launch.rank))
    environment.setdefault("WORLD_SIZE", str(launch.world))
    environment.setdefault("LOCAL_RANK", str(launch.local_rank))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if launch.world == 1:
        environment.setdefault("MASTER_ADDR", LOOPBACK)
        environment.setdefault("MASTER_PORT", str(free_port()))
    elif "SLURM_PROCID" in environment and nodes:
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = slurm.reachable(slurm.first_host(nodes))
        if "CLIPO_JOB" not in environment:
            environment.setdefault("MASTER_PORT", str(PORTS[slurm.step_number(environment) % len(PORTS)]))
    elif "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise ConfigError(
            f"rank {launch.rank} of {launch.world} has no rendezvous address: MASTER_ADDR and MASTER_PORT are not set. "
            "Start under torchrun or srun, or set both."
        )
    if environment["MASTER_ADDR"] in (LOOPBACK, "localhost"):
        from clipo_megatron.runtime.platform import LOCAL_RENDEZVOUS_ENV

        for name, value in LOCAL_RENDEZVOUS_ENV.items():
            environment.setdefault(name, value)


def leads(place: Launch | None) -> bool:
    """Whether this process is the one of a run that checks what it reads: the parent of its ranks, or else rank 0."""
    return _CHECKED not in os.environ and (place is None or place.rank == 0)


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
        _CHECKED: "1",
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
) -> int:
    """Start one process for each command and wait for all. No rank outlives a failure of another, or this process.

    When a rank fails, the others have `settle_s` to fail too, then get SIGTERM, and SIGKILL after `grace_s`. The first
    SIGINT or SIGTERM is forwarded, and the ranks may take `stop_deadline_s` to end; the second one kills them. Must be
    called from the main thread, because it handles signals.

    Returns:
        0 if all ranks succeed; 128 + the signal's number if a signal was forwarded and no rank failed by itself; 2 if
        rank 0 has reported an error of the user itself.

    Raises:
        RankError: a rank failed; has its number, its exit code or signal, and the last lines of its log.
    """
    return _Supervision(commands, grace_s, settle_s, stop_deadline_s).run()


def supervise_again(
    start: Callable[[int], int], *, restarts: int, progress: Callable[[], object], say: Callable[[str], None] = _say
) -> int:
    """Start ranks again after a failure, until they succeed, are asked to end, or fail too often.

    Args:
        start: starts ranks and waits for them, as `supervise` does; gets the number of the attempt.
        restarts: how many restarts in a row may fail without progress.
        progress: returns a value that changes whenever an attempt has got further than those before.
        say: prints a line about each restart.

    Raises:
        RankError: that of the last attempt.
    """
    attempt = failures = 0
    reached = progress()
    while True:
        try:
            return start(attempt)
        except RankError as error:
            before, reached = reached, progress()
            failures = failures + 1 if reached == before else 1
            if failures > restarts:
                raise
            attempt += 1
            say(f"clipo: {error}\nStarting the ranks again (restart {attempt}, faults.max_restarts = {restarts}).")


class _Supervision:
    def __init__(self, commands: Sequence[RankCommand], grace_s: float, settle_s: float, stop_deadline_s: float):
        self.commands = commands
        self.grace_s, self.settle_s, self.stop_deadline_s = grace_s, settle_s, stop_deadline_s
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log_starts: list[int] = []
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.running: set[int] = set()
        self.failed: list[int] = []  # ranks that failed by themselves, first failure first
        self.signals: list[int] = []  # received from the user or the scheduler

    def run(self) -> int:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._start()
            self._wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._end()
        return self._outcome()

    def _on_signal(self, number: int, _frame: object) -> None:
        self.signals.append(number)

    def _start(self) -> None:
        bind = dies_with_this_process()
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
                        process_group=0,  # so that Ctrl-C reaches this process alone, which forwards it
                        preexec_fn=bind,
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
        deadline: float | None = None
        forwarded = 0
        while self.running:
            if deadline is not None and time.monotonic() > deadline:
                if not self.failed:
                    _say(f"The ranks did not end within {self.stop_deadline_s:.0f} s of the signal; ending them.")
                return
            try:
                rank = self.ended.get(timeout=0.1)
            except queue.Empty:
                rank = None
            if rank is not None:
                self.running.discard(rank)
                if self._is_failure(self.processes[rank].returncode):
                    self.failed.append(rank)
                    deadline = deadline if self.failed[1:] else time.monotonic() + self.settle_s
            if len(self.signals) > 1:
                _say("Killing all ranks.")
                self._signal(signal.SIGKILL)
                return
            if len(self.signals) > forwarded and not self.failed:
                forwarded = 1
                _say("Stopping: the ranks end their step. The same signal again kills them.")
                self._signal(self.signals[0])
                deadline = time.monotonic() + self.stop_deadline_s

    def _is_failure(self, code: int) -> bool:
        # a rank that was asked to end exits with 130 or -SIGINT, say
        asked = {code for number in self.signals for code in (128 + number, -number)}
        return code != 0 and code not in asked

    def _signal(self, number: int) -> None:
        """Send a signal to every running rank and its child processes."""
        for rank in self.running:
            try:
                os.killpg(self.processes[rank].pid, number)
            except ProcessLookupError:
                continue  # it has just ended

    def _end(self) -> None:
        """End running ranks, by SIGTERM first, and kill child processes of ranks that have ended."""
        for number, patience in ((signal.SIGTERM, self.grace_s), (signal.SIGKILL, 10.0)):
            if not self.running or (number == signal.SIGTERM and len(self.signals) > 1):
                continue
            self._signal(number)
            deadline = time.monotonic() + patience
            while self.running and (left := deadline - time.monotonic()) > 0:
                try:
                    self.running.discard(self.ended.get(timeout=min(left, 0.1)))
                except queue.Empty:
                    if number == signal.SIGTERM and len(self.signals) > 1:
                        break
        self.running = set(range(len(self.processes)))
        self._signal(signal.SIGKILL)

    def _outcome(self) -> int:
        codes = [process.returncode for process in self.processes]
        if self.failed:
            first = self.failed[0]
            if codes[first] == 2 and codes[0] == 2:
                return 2  # an error of the user, the same on every rank, which rank 0 has reported
            raise RankError(self._report(first), exit_code=_as_exit_code(codes[first]))
        if self.signals and any(code != 0 for code in codes):  # None: still running after SIGKILL
            return 128 + self.signals[0]
        return 0

    def _report(self, rank: int) -> str:
        code = self.processes[rank].returncode
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


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
