"""Keeps servers running: starts them, waits until they are ready, registers them, and restarts them when they fail.

A server has failed when its leader exits, when its HTTP process does not answer for `health_timeout_s`, when one of its
processes has been stopped for as long, or when its engine does not answer for `engine_timeout_s`. That is longer than
any update of the weights may take, so a busy server is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipo_megatron.config.errors import counted
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.runtime.stop_requests import AGAIN_AFTER_S, ALL, REQUESTS, signal_name
from clipo_megatron.serving.commands import ServerCommand
from clipo_megatron.serving.errors import ServingError
from clipo_megatron.serving.probes import Probe
from clipo_megatron.serving.process import ServerProcess

Say = Callable[[str], None]

USAGE_EXIT = 2  # exit code of a program with wrong options, which would fail again
_TICK_S = 0.1
_STATES_EVERY_S = 1.0  # between two looks at the states of a server's processes
_REPORT_EVERY_S = 30.0  # between two lines that a server is still starting
_ROOM_EVERY_S = 2.0  # between two looks at the memory of GPUs on which a server is to start
_START_PROBE_S, _HTTP_PROBE_S, _ENGINE_PROBE_S = 0.5, 2.0, 10.0  # between two probes, at most
_READY_TIMEOUT_S = 30.0  # for a probe of a starting server; SGLang's own health check takes up to 20 s
_PAUSED_S = 5.0  # without a tick: this process itself was stopped
_MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How long a server may take, in seconds, and how often it may fail."""

    startup_timeout_s: float  # until it is ready
    health_timeout_s: float  # for its HTTP process to answer
    engine_timeout_s: float  # for its engine to answer
    max_restarts: int  # failed starts in a row
    backoff_s: float = 1.0  # after the first failed start; doubles with each further one
    grace_period_s: float = 10.0  # to end by itself after SIGTERM


@dataclass(slots=True)
class ServerSpec:
    """A server to keep running."""

    record: ServerRecord  # with the URL and port that were chosen first
    port: int
    command: Callable[[int, Path], ServerCommand]  # (port, scratch folder) -> how to start it
    url: Callable[[int], str]  # port -> URL
    probe: Callable[[str], Probe]  # URL -> its health checks
    log: Path
    host: str = "127.0.0.1"  # the address that it listens on
    port_is_fixed: bool = False
    has_room: Callable[[], bool] = lambda: True  # whether its GPUs have the memory that it takes when it starts


@dataclass(slots=True)
class _SupervisedServer:
    """A server and its current state."""

    spec: ServerSpec
    record: ServerRecord
    port: int
    process: ServerProcess | None = None
    probes: list[_ProbeLoop] = field(default_factory=list)
    ready: bool = False
    failed_starts: int = 0  # in a row
    retry_at: float | None = 0.0  # None: given up
    reported_at: float = 0.0
    states_read_at: float = 0.0
    stopped_since: float | None = None  # when one of its processes was first seen stopped


class _ProbeLoop(threading.Thread):
    """Repeats one health check, and remembers when it last succeeded."""

    def __init__(self, probe: Callable[[float], bool], every_s: float, timeout_s: float):
        super().__init__(daemon=True)
        self._probe, self._every_s, self._timeout_s = probe, every_s, timeout_s
        self._ended = threading.Event()
        self._last_success = time.monotonic()
        self.ever_succeeded = False

    def run(self) -> None:
        while not self._ended.is_set():
            if self._probe(self._timeout_s):
                self._last_success, self.ever_succeeded = time.monotonic(), True
            self._ended.wait(self._every_s)

    def end(self) -> None:
        """Start no further check; does not wait for the current one."""
        self._ended.set()

    def reset(self) -> None:
        """Count silence from now on."""
        self._last_success = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the last success, or since the first check."""
        return time.monotonic() - self._last_success


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Supervisor:
    """Runs servers until a signal stops it, or until no server is left that can be started.

    Args:
        specs: the servers to run.
        registry: where they are registered for the trainer.
        limits: deadlines and numbers of attempts, the same for all servers.
        secrets: words to keep out of the servers' logs.
        say: receives one line for each change.
    """

    def __init__(
        self,
        specs: Sequence[ServerSpec],
        registry: Registry,
        limits: ServerLimits,
        *,
        secrets: Sequence[str] = (),
        say: Say = _print,
    ):
        self._servers = [_SupervisedServer(spec, spec.record, spec.port) for spec in specs]
        self._registry, self._limits, self._secrets, self._say = registry, limits, tuple(secrets), say
        self._last_failure = ""
        self._ticked_at = time.monotonic()

    def run(self) -> int:
        """Run the servers; must be called from the main thread, which receives signals.

        Returns:
            128 + the number of the signal that ended it.

        Raises:
            ServingError: no server is left that can be started; has the end of the last one's log.
        """
        with REQUESTS.handled(tolerated=ALL):
            try:
                with tempfile.TemporaryDirectory(prefix="clipo-serve-") as scratch:
                    while not REQUESTS.count:
                        self._notice_pause()
                        for server in self._servers:
                            self._check(server, Path(scratch))
                        if all(server.retry_at is None for server in self._servers):
                            raise ServingError(self._last_failure)
                        time.sleep(_TICK_S)
                    servers = counted(len(self._servers), "server")
                    name = signal_name(REQUESTS.signum)
                    self._say(f"{name}: stopping {servers}. A signal after {AGAIN_AFTER_S:g} s kills them.")
                    return 128 + REQUESTS.signum
            finally:
                self._end()

    def _notice_pause(self) -> None:
        """Forgive the servers their silence if this process itself was stopped (Ctrl-Z)."""
        now = time.monotonic()
        if now - self._ticked_at > _PAUSED_S:
            for server in self._servers:
                server.stopped_since = None
                for probe in server.probes:
                    probe.reset()
        self._ticked_at = now

    # --- one server ----------------------------------------------------------------------------------------------

    def _check(self, server: _SupervisedServer, scratch: Path) -> None:
        now = time.monotonic()
        if server.process is None:
            if server.retry_at is not None and now >= server.retry_at:
                self._start_with_room(server, now, scratch)
            return
        code = server.process.exit_code()
        if code is not None:
            self._failed(server, _describe_exit(code), hopeless=code == USAGE_EXIT and not server.ready)
        elif not server.ready:
            self._check_start(server, now)
        elif reason := self._why_hanging(server, now):
            self._failed(server, reason)

    def _start_with_room(self, server: _SupervisedServer, now: float, scratch: Path) -> None:
        """Start a server, unless a trainer that takes turns with it on its GPUs has their memory now."""
        if server.spec.has_room():
            self._start(server, scratch)
            return
        server.retry_at = now + _ROOM_EVERY_S
        if now - server.reported_at > _REPORT_EVERY_S:
            server.reported_at = now
            self._say(f"{server.record.name}: waits until the memory of its GPUs is free")

    def _start(self, server: _SupervisedServer, scratch: Path) -> None:
        spec = server.spec
        if not spec.port_is_fixed and not _is_free(spec.host, server.port):
            server.port = free_port()
        url = spec.url(server.port)
        self._say(f"{server.record.name}: starting on {url}, log {spec.log}")
        command = spec.command(server.port, scratch)
        try:
            server.process = ServerProcess(command, spec.log, secrets=self._secrets)
        except OSError as error:
            raise ServingError(f"{command.arguments[0]} cannot be run: {error}. Correct serve.python.") from error
        self._register(server, Status.starting, url=url, pid=server.process.pid, boot=uuid.uuid4().hex)
        server.ready, server.stopped_since = False, None
        server.reported_at = time.monotonic()
        server.probes = [_ProbeLoop(spec.probe(url).generates, _START_PROBE_S, _READY_TIMEOUT_S)]
        server.probes[0].start()

    def _check_start(self, server: _SupervisedServer, now: float) -> None:
        seconds = now - server.process.started_at
        if server.probes[0].ever_succeeded:
            self._became_ready(server, seconds)
        elif reason := self._why_stopped(server, now):
            self._failed(server, reason)
        elif seconds > self._limits.startup_timeout_s:
            self._failed(server, f"was not ready after {self._limits.startup_timeout_s:.0f} s")
        elif now - server.reported_at > _REPORT_EVERY_S:
            server.reported_at = now
            self._say(
                f"{server.record.name}: starting for {seconds:.0f} s, of {self._limits.startup_timeout_s:.0f} s at most"
            )

    def _became_ready(self, server: _SupervisedServer, seconds: float) -> None:
        server.process.forget_secret()
        server.probes[0].end()
        checks = server.spec.probe(server.record.url)
        http, engine = self._limits.health_timeout_s, self._limits.engine_timeout_s
        # A check waits as long as the limit itself, because a late answer shows too that the server is alive.
        server.probes = [
            _ProbeLoop(checks.answers, min(_HTTP_PROBE_S, http / 5), http),
            _ProbeLoop(checks.engine_answers, min(_ENGINE_PROBE_S, engine / 5), engine),
        ]
        for probe in server.probes:
            probe.start()
        server.ready, server.failed_starts = True, 0
        self._register(server, Status.ready)
        self._say(f"{server.record.name}: ready after {seconds:.0f} s")
        if all(each.ready for each in self._servers):
            self._say(f"{counted(len(self._servers), 'server')} ready. Ctrl-C stops.")

    def _why_hanging(self, server: _SupervisedServer, now: float) -> str | None:
        """The reason why a ready server counts as hanging, None if it does not."""
        limits, (http, engine) = self._limits, server.probes
        if http.silent_s > limits.health_timeout_s:
            return f"has not answered for {http.silent_s:.0f} s"
        if engine.silent_s > limits.engine_timeout_s:
            return f"answers, but its engine has not for {engine.silent_s:.0f} s"
        return self._why_stopped(server, now)

    def _why_stopped(self, server: _SupervisedServer, now: float) -> str | None:
        """The reason why a server counts as stopped, None if no process of it was stopped for too long."""
        if now - server.states_read_at > _STATES_EVERY_S:
            server.states_read_at = now
            if "T" not in server.process.members().values():
                server.stopped_since = None
            elif server.stopped_since is None:
                server.stopped_since = now
        if server.stopped_since is not None and now - server.stopped_since > self._limits.health_timeout_s:
            return f"has a process that has been stopped for {now - server.stopped_since:.0f} s"
        return None

    def _failed(self, server: _SupervisedServer, how: str, *, hopeless: bool = False) -> None:
        """Kill what is left of a server, and decide whether and when to start it again."""
        name, was_ready, tail = server.record.name, server.ready, server.process.tail()
        self._end_processes(server)
        self._register(server, Status.failed)
        if was_ready:
            server.retry_at = time.monotonic()
            self._say(f"{name}: {how}; starting it again")
            return
        server.failed_starts += 1
        if not hopeless and server.failed_starts <= self._limits.max_restarts:
            wait = min(_MAX_BACKOFF_S, self._limits.backoff_s * 2 ** (server.failed_starts - 1))
            server.retry_at = time.monotonic() + wait
            tries = f"try {server.failed_starts + 1} of {self._limits.max_restarts + 1}"
            self._say(f"{name}: {how} while starting; {tries} in {wait:.0f} s")
            return
        server.retry_at = None
        why = "its options are wrong" if hopeless else f"it failed {counted(server.failed_starts, 'time')} in a row"
        self._last_failure = f"{name} cannot be started: {why}. Last, it {how}. The end of {server.spec.log}:\n{tail}"
        if any(each.retry_at is not None for each in self._servers):
            self._say(f"{self._last_failure}\nThe other servers go on.")

    def _end_processes(self, server: _SupervisedServer) -> None:
        """Kill a server's process group, and end its health checks."""
        for probe in server.probes:
            probe.end()
        server.probes, server.ready = [], False
        if server.process is not None:
            server.process.kill()
            server.process = None

    def _register(self, server: _SupervisedServer, status: Status, **changes: str | int) -> None:
        server.record = replace(server.record, status=status, updated_at=time.time(), **changes)
        with contextlib.suppress(OSError):  # a full disk must not stop the servers
            self._registry.write(server.record)

    # --- all servers ---------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Send SIGTERM to all servers, kill those that do not end, and register them as stopped."""
        running = [server for server in self._servers if server.process is not None]
        for server in running:
            server.process.terminate()
        deadline = time.monotonic() + self._limits.grace_period_s
        while time.monotonic() < deadline and REQUESTS.count < 2:
            if all(server.process.exit_code() is not None for server in running):
                break
            time.sleep(_TICK_S)
        for server in self._servers:
            self._end_processes(server)
            if server.retry_at is not None:
                self._register(server, Status.stopped)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Lock the registry's folder against a second `clipo serve` on this machine.

    Raises:
        ServingError: another one holds the lock, or the folder cannot be written to.
    """
    file = folder / f".{host_name()}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+")
    except OSError as error:
        raise ServingError(f"{folder} cannot be written to: {error}. Choose another train.output.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise ServingError(
                f"{holder} runs servers for {folder.parent} on this machine already. End it, or choose another "
                "train.output."
            ) from None
        except OSError:
            pass  # a file system without locks
        lock.truncate(0)
        lock.write(f"process {os.getpid()}\n")
        lock.flush()
        yield


def host_name() -> str:
    """A name of this machine for file names. Under Slurm it is the node's name, because nodes may share a machine."""
    short = (os.environ.get("SLURMD_NODENAME") or socket.gethostname()).partition(".")[0]
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in short) or "host"


def _is_free(host: str, port: int) -> bool:
    """Whether nothing listens on the port. Connections in TIME_WAIT do not count."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal_name(-code)}"
