"""A grader process as the pool sees it: asked for verdicts, killed at a deadline, started again when it is needed.

Each message is one line of JSON in ASCII, whose escapes carry every Python string, null bytes and lone surrogates
included. The process runs untrusted text through SymPy, so nothing that it sends is unpickled or executed here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from functools import cache
from typing import Any

from clipo_megatron.config.schema import GraderSandbox
from clipo_megatron.rewards import sandbox

_log = logging.getLogger(__name__)
_LONGEST_REPLY = 1 << 16  # bytes
_START_DEADLINE_S = 120.0  # for a worker to start and load the libraries of a mode; no part of an answer's deadline


class GraderFailure(Exception):
    """The process gave no verdict, and has been killed.

    Attributes:
        started: whether it had begun to grade the answer.
        timeout: whether a deadline passed; otherwise the process could not start, or ended by itself.
    """

    def __init__(self, reason: str, *, started: bool = False, timeout: bool = False):
        super().__init__(reason)
        self.started = started
        self.timeout = timeout


class GraderStartError(RuntimeError):
    """No grader process of this run has ever begun to judge: each answer would stay without a verdict."""


class GraderProcess:
    """One worker process at a time, and the two pipes to it. It inherits no other descriptor, and no environment.

    One thread at a time may call `ask`; `start` and `close` may be called from any thread.

    Args:
        memory_bytes: limit of the worker's address space.
        sandbox: what the worker may do besides (`sandbox/`).
        first_mode: the grading mode whose libraries the worker loads before its first answer.
    """

    def __init__(self, *, memory_bytes: int, sandbox: GraderSandbox, first_mode: str):
        self._memory_bytes = memory_bytes
        self._sandbox = sandbox
        self._first_mode = first_mode
        self._process: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - standard error of all processes; closed in close()
        self._received = bytearray()  # of the reply that is being read
        self._loaded: set[str] = set()  # modes whose libraries the process has loaded
        self._closed = False
        self._lock = threading.Lock()  # held while a process is started or killed

    @property
    def pid(self) -> int | None:
        """Id of the running process; None before the first and between two."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the process unless it runs; it loads the libraries of `first_mode`, which is not waited for.

        The kernel ends the process with the thread that starts it.

        Raises:
            GraderFailure: the process cannot be started, or `close` was called.
        """
        with self._lock:
            if self._closed:
                raise GraderFailure("the grader pool was closed")
            if self._process is not None:
                return
            self._received.clear()
            self._loaded.clear()
            try:
                arguments = (str(self._memory_bytes), str(os.getpid()), self._sandbox.value)
                process = subprocess.Popen(
                    sandbox.python("clipo_megatron.rewards.worker", *arguments),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    bufsize=0,
                    env=sandbox.environment(),
                    cwd="/",
                )
            except OSError as error:  # no memory or no process left; the next answer tries again
                raise GraderFailure(f"the grader process could not be started: {error}") from None
            for pipe in (process.stdin, process.stdout):
                os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(OSError):  # the process ended already, which the first answer will notice
                os.write(process.stdin.fileno(), _encode({"load": self._first_mode}))
            self._process = process

    def ask(self, request: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """The worker's reply to `request`, which `worker.py` describes; starts a process if none runs.

        Args:
            request: a mode and an answer.
            deadline_s: seconds for grading, and for the worker to begin once it has loaded the mode's libraries.

        Raises:
            GraderFailure: a deadline passed, or the process ended or could not be started.
            SandboxError: the worker has not the sandbox that the run insists on.
            TypeError: JSON cannot carry the request.
        """
        line, started, wait_s = _encode(request), False, deadline_s
        self.start()
        if request["mode"] not in self._loaded:
            wait_s = _START_DEADLINE_S
        try:
            until = time.monotonic() + wait_s
            self._send(line, until)
            layers = self._receive(until).get("layers", [])
            started, wait_s = True, deadline_s
            self._judge_sandbox(layers)
            self._loaded.add(request["mode"])
            return self._receive(time.monotonic() + deadline_s)
        except TimeoutError:
            waited = f"{wait_s:g} s" if started else f"{wait_s:g} s of waiting for the worker to start"
            reason, timeout = f"no verdict within {waited}; worker killed", True
        except (EOFError, OSError, ValueError, RecursionError) as error:  # the latter two: a reply that is none
            reason, timeout = self._how_it_ended(error), False
        self._kill()
        raise GraderFailure(reason, started=started, timeout=timeout)

    def close(self) -> None:
        """Kill the process for good. A thread that waits in `ask` gets a `GraderFailure`."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def release(self) -> None:
        """Close the files of a closed process that no thread uses any more."""
        self._kill()
        self._errors.close()

    def _judge_sandbox(self, layers: list[str]) -> None:
        reason = sandbox.missing(layers)
        if reason and self._sandbox is GraderSandbox.required:
            self._kill()
            raise sandbox.SandboxError(f"reward.sandbox = required: {reason}. {sandbox.REMEDY}.")
        if reason and self._sandbox is GraderSandbox.auto:
            _warn(reason)

    def _kill(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _send(self, line: bytes, until: float) -> None:
        view, descriptor = memoryview(line), self._process.stdin.fileno()
        while view:
            _wait(descriptor, select.POLLOUT, until)
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(descriptor, view) :]

    def _receive(self, until: float) -> dict[str, Any]:
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._received:
            if len(self._received) > _LONGEST_REPLY:
                raise ValueError(f"a reply of more than {_LONGEST_REPLY} bytes")
            _wait(descriptor, select.POLLIN, until)
            part = os.read(descriptor, _LONGEST_REPLY)
            if not part:
                raise EOFError
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError("a reply that is no JSON object")
        return reply

    def _how_it_ended(self, error: Exception) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return f"the grader process broke its connection ({type(error).__name__}: {error})"
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self._errors.seek(0)
        last_line = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
        return f"grader process {ended}" + (f": {last_line}" if last_line else "")


@cache
def _warn(reason: str) -> None:
    """Log a warning, once."""
    _log.warning("%s", reason)


def _encode(message: dict[str, Any]) -> bytes:
    """The line of a message. Values that JSON does not know (dates, fractions) become their text."""
    return json.dumps(message, default=str).encode("ascii") + b"\n"


def _wait(descriptor: int, event: int, until: float) -> None:
    poll = select.poll()  # select() would fail on descriptors beyond 1023
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError
