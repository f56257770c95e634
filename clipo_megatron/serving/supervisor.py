"""Keeps servers running: starts them, waits until they are ready, registers them, and starts them again when they fail.

A server has failed when its leader ended, when its HTTP process says nothing for `health_timeout_s`, when one of its
processes has been stopped for so long, or when its engine says nothing for `engine_silent_s`: that is longer than any
update of weights may take, so a server that is busy is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.serving.commands import ServerCommand
from clipo_megatron.serving.errors import ServingError
from clipo_megatron.serving.probes import Probe
from clipo_megatron.serving.process import ServerProcess

Say = Callable[[str], None]

USAGE_EXIT = 2  # how a program ends whose options are wrong: trying again would not help
_TICK_S = 0.1
_LOOK_S = 1.0  # between two looks at the states of a server's processes
_TELL_EVERY_S = 30.0
_STARTING_PROBE_S, _LIGHT_PROBE_S, _ENGINE_PROBE_S = 0.5, 2.0, 10.0  # between two questions, at most
_READY_TIMEOUT_S = 30.0  # SGLang gives a health check 20 s by itself
_ABSENCE_S = 5.0  # without a tick: this process itself was stopped
_LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds, and how often they may fail."""

    start_s: float  # until a server is ready
    health_timeout_s: float  # for its HTTP process to say something
    engine_silent_s: float  # for its engine
    restarts: int  # failed starts in a row
    backoff_s: float = 1.0  # after the first failed start; doubles with each further one
    stop_s: float = 10.0  # to end by itself when asked to


@dataclass(slots=True)
class Wanted:
    """One server that shall run. `command` makes its command line for a port, `probe` asks it, given its URL."""

    entry: ServerRecord  # url and port as first chosen
    port: int
    command: Callable[[int, Path], ServerCommand]
    url: Callable[[int], str]
    probe: Callable[[str], Probe]
    log: Path
    host: str = "127.0.0.1"  # that it listens on
    port_is_fixed: bool = False


@dataclass(slots=True)
class _Server:
    """A wanted server and how it is doing."""

    wanted: Wanted
    entry: ServerRecord
    port: int
    process: ServerProcess | None = None
    watches: list[_Watch] = field(default_factory=list)
    ready: bool = False
    failed_starts: int = 0  # in a row
    retry_at: float | None = 0.0  # None: given up
    told_at: float = 0.0
    looked_at: float = 0.0
    stopped_since: float | None = None  # when one of its processes was first seen stopped


class _Watch(threading.Thread):
    """Asks one question again and again, and remembers when the answer was last yes."""

    def __init__(self, question: Callable[[float], bool], every_s: float, timeout_s: float):
        super().__init__(daemon=True)
        self._question, self._every_s, self._timeout_s = question, every_s, timeout_s
        self._over = threading.Event()
        self.last_yes = time.monotonic()
        self.ever = False

    def run(self) -> None:
        while not self._over.is_set():
            if self._question(self._timeout_s):
                self.last_yes, self.ever = time.monotonic(), True
            self._over.wait(self._every_s)

    def end(self) -> None:
        """Ask no more; does not wait for an answer that is under way."""
        self._over.set()

    def forgive(self) -> None:
        """Count silence from now on."""
        self.last_yes = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Since the last yes, or since it began to ask."""
        return time.monotonic() - self.last_yes


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Supervisor:
    """Runs servers until it is told to stop, or none is left that can be started.

    Args:
        wanted: what to run.
        registry: where the trainer finds them.
        patience: see there.
        secrets: words to be kept out of the servers' logs.
        say: gets one line a change.
    """

    def __init__(
        self,
        wanted: Sequence[Wanted],
        registry: Registry,
        patience: Patience,
        *,
        secrets: Sequence[str] = (),
        say: Say = _print,
    ):
        self._servers = [_Server(each, each.entry, each.port) for each in wanted]
        self._registry, self._patience, self._secrets, self._say = registry, patience, tuple(secrets), say
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._last_words = ""
        self._ticked_at = time.monotonic()

    def run(self) -> int:
        """From the main thread, for the signals.

        Returns:
            128 + the number of the signal that ended it.

        Raises:
            ServingError: no server is left that can be started; with the end of the last one's log.
        """
        handlers = {
            number: signal.signal(number, lambda number, _frame: self._signals.put(number))
            for number in (signal.SIGINT, signal.SIGTERM)
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN  # as a job's script starts it
        }
        try:
            with tempfile.TemporaryDirectory(prefix="clipo-serve-") as scratch:
                while self._signals.empty():
                    self._notice_absence()
                    for server in self._servers:
                        self._tend(server, Path(scratch))
                    if all(server.retry_at is None for server in self._servers):
                        raise ServingError(self._last_words)
                    time.sleep(_TICK_S)
                number = self._signals.get()
                self._say(f"Stopping {_count(len(self._servers), 'server')}. The same signal again kills them.")
                return 128 + number
        finally:
            try:
                self._end()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _notice_absence(self) -> None:
        """A process that was stopped (Ctrl-Z) has heard nobody, and must not blame the servers for it."""
        now = time.monotonic()
        if now - self._ticked_at > _ABSENCE_S:
            for server in self._servers:
                server.stopped_since = None
                for watch in server.watches:
                    watch.forgive()
        self._ticked_at = now

    # --- one server ----------------------------------------------------------------------------------------------

    def _tend(self, server: _Server, scratch: Path) -> None:
        now = time.monotonic()
        if server.process is None:
            if server.retry_at is not None and now >= server.retry_at:
                self._start(server, scratch)
            return
        code = server.process.ended()
        if code is not None:
            self._failed(server, _how(code), hopeless=code == USAGE_EXIT and not server.ready)
        elif not server.ready:
            self._await(server, now)
        elif reason := self._hangs(server, now):
            self._failed(server, reason)

    def _start(self, server: _Server, scratch: Path) -> None:
        wanted = server.wanted
        if not wanted.port_is_fixed and not _is_free(wanted.host, server.port):
            server.port = free_port()
        url = wanted.url(server.port)
        self._say(f"{server.entry.name}: starting on {url}, log {wanted.log}")
        command = wanted.command(server.port, scratch)
        try:
            server.process = ServerProcess(command, wanted.log, secrets=self._secrets)
        except OSError as error:
            raise ServingError(f"{command.arguments[0]} cannot be run: {error}. Correct serve.python.") from error
        self._write(server, Status.starting, url=url, pid=server.process.pid, boot=uuid.uuid4().hex)
        server.ready, server.stopped_since = False, None
        server.told_at = time.monotonic()
        server.watches = [_Watch(wanted.probe(url).generates, _STARTING_PROBE_S, _READY_TIMEOUT_S)]
        server.watches[0].start()

    def _await(self, server: _Server, now: float) -> None:
        seconds = now - server.process.started_at
        if server.watches[0].ever:
            self._became_ready(server, seconds)
        elif reason := self._is_stopped(server, now):
            self._failed(server, reason)
        elif seconds > self._patience.start_s:
            self._failed(server, f"was not ready after {self._patience.start_s:.0f} s")
        elif now - server.told_at > _TELL_EVERY_S:
            server.told_at = now
            self._say(f"{server.entry.name}: starting for {seconds:.0f} s, of {self._patience.start_s:.0f} s at most")

    def _became_ready(self, server: _Server, seconds: float) -> None:
        server.process.forget_secret()
        server.watches[0].end()
        probe = server.wanted.probe(server.entry.url)
        light, engine = self._patience.health_timeout_s, self._patience.engine_silent_s
        # An answer counts whenever it comes: one that is late by less than the limit shows that the server lives.
        server.watches = [
            _Watch(probe.answers, min(_LIGHT_PROBE_S, light / 5), light),
            _Watch(probe.engine_answers, min(_ENGINE_PROBE_S, engine / 5), engine),
        ]
        for watch in server.watches:
            watch.start()
        server.ready, server.failed_starts = True, 0
        self._write(server, Status.ready)
        self._say(f"{server.entry.name}: ready after {seconds:.0f} s")
        if all(each.ready for each in self._servers):
            self._say(f"{_count(len(self._servers), 'server')} ready. Ctrl-C stops.")

    def _hangs(self, server: _Server, now: float) -> str | None:
        """Why a ready server must be given up, if it must."""
        patience, (light, engine) = self._patience, server.watches
        if light.silent_s > patience.health_timeout_s:
            return f"has not answered for {light.silent_s:.0f} s"
        if engine.silent_s > patience.engine_silent_s:
            return f"answers, but its engine has not for {engine.silent_s:.0f} s"
        return self._is_stopped(server, now)

    def _is_stopped(self, server: _Server, now: float) -> str | None:
        """Whether one of its processes was stopped, and for how long."""
        if now - server.looked_at > _LOOK_S:
            server.looked_at = now
            if "T" not in server.process.members().values():
                server.stopped_since = None
            elif server.stopped_since is None:
                server.stopped_since = now
        if server.stopped_since is not None and now - server.stopped_since > self._patience.health_timeout_s:
            return f"has a process that has been stopped for {now - server.stopped_since:.0f} s"
        return None

    def _failed(self, server: _Server, how: str, *, hopeless: bool = False) -> None:
        """Kill what is left, and decide when to start it again."""
        name, was_ready, tail = server.entry.name, server.ready, server.process.tail()
        self._forget(server)
        self._write(server, Status.failed)
        if was_ready:
            server.retry_at = time.monotonic()
            self._say(f"{name}: {how}; starting it again")
            return
        server.failed_starts += 1
        if not hopeless and server.failed_starts <= self._patience.restarts:
            wait = min(_LONGEST_BACKOFF_S, self._patience.backoff_s * 2 ** (server.failed_starts - 1))
            server.retry_at = time.monotonic() + wait
            tries = f"try {server.failed_starts + 1} of {self._patience.restarts + 1}"
            self._say(f"{name}: {how} while starting; {tries} in {wait:.0f} s")
            return
        server.retry_at = None
        why = "its options are wrong" if hopeless else f"it failed {_count(server.failed_starts, 'time')} in a row"
        self._last_words = f"{name} cannot be started: {why}. At last it {how}. The end of {server.wanted.log}:\n{tail}"
        if any(each.retry_at is not None for each in self._servers):
            self._say(f"{self._last_words}\nThe other servers go on.")

    def _forget(self, server: _Server) -> None:
        """End its process group, and the questions."""
        for watch in server.watches:
            watch.end()
        server.watches, server.ready = [], False
        if server.process is not None:
            server.process.kill()
            server.process = None

    def _write(self, server: _Server, status: Status, **changes: str | int) -> None:
        server.entry = replace(server.entry, status=status, updated_at=time.time(), **changes)
        with contextlib.suppress(OSError):  # a full disk must not stop the servers; the next change is written again
            self._registry.write(server.entry)

    # --- all of them ---------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Ask all to end, kill those that do not, and say so in the registry."""
        running = [server for server in self._servers if server.process is not None]
        for server in running:
            server.process.terminate()
        deadline = time.monotonic() + self._patience.stop_s
        while time.monotonic() < deadline and self._signals.empty():
            if all(server.process.ended() is not None for server in running):
                break
            time.sleep(_TICK_S)
        for server in self._servers:
            self._forget(server)
            if server.retry_at is not None:
                self._write(server, Status.stopped)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the registry's folder against a second `clipo serve` of this machine.

    Raises:
        ServingError: there is one, or the folder cannot be written to.
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
    """Of this machine, fit for a file's name; Slurm's where it runs us, since several nodes may be one machine."""
    short = (os.environ.get("SLURMD_NODENAME") or socket.gethostname()).partition(".")[0]
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in short) or "host"


def _is_free(host: str, port: int) -> bool:
    """Whether nothing listens there. Connections that are only winding down do not count."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
