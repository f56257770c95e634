"""One grader process, seen from the pool: started, asked with a deadline, killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clipo_megatron.rewards import frames

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class GraderFailure(Exception):
    """The process gave no verdict and must be killed.

    Attributes:
        started: whether it had begun to grade the answer.
        timeout: whether a deadline passed; otherwise the process ended by itself.
    """

    def __init__(self, reason: str, *, started: bool, timeout: bool):
        super().__init__(reason)
        self.started = started
        self.timeout = timeout


class GraderProcess:
    """A worker and the two pipes to it. It inherits no other descriptor: no sockets, no device handles.

    Create it in a thread that lives as long as the process should: the kernel ends it with that thread.
    """

    def __init__(self, *, memory_bytes: int, warm: str):
        search = [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process lives; closed in kill()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clipo_megatron.rewards.worker", str(memory_bytes), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            close_fds=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, search)),
                "OMP_NUM_THREADS": "1",  # threads reserve address space, which is limited
                "OPENBLAS_NUM_THREADS": "1",
                "MPLBACKEND": "Agg",
            },
        )
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._first = frames.encode({"warm": warm})
        self._loaded: set[str] = set()  # modes whose libraries are known to be loaded

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, request: dict[str, Any], *, deadline_s: float, start_deadline_s: float) -> dict[str, Any]:
        """The worker's reply to `request`.

        Args:
            request: what `worker.py` reads.
            deadline_s: seconds for grading, once the worker says that it has started.
            start_deadline_s: seconds until then, when the process must first start or load the mode's libraries;
                otherwise `deadline_s` holds for this too.

        Raises:
            GraderFailure: a deadline passed or the process ended. It is of no further use; kill it.
        """
        started = False
        if request["mode"] in self._loaded:
            start_deadline_s = deadline_s
        try:
            until = time.monotonic() + start_deadline_s
            self._write(self._first + frames.encode(request), until)
            self._first = b""
            frames.read(lambda size: self._read(size, until))
            started = True
            self._loaded.add(request["mode"])
            until = time.monotonic() + deadline_s
            return frames.read(lambda size: self._read(size, until))
        except TimeoutError:
            waited = f"{deadline_s:g} s" if started else f"{start_deadline_s:g} s of waiting for the worker to start"
            raise GraderFailure(f"no verdict within {waited}; worker killed", started=started, timeout=True) from None
        except (EOFError, OSError, ValueError) as error:
            raise GraderFailure(self._epitaph(error), started=started, timeout=False) from None

    def warm_up(self) -> None:
        """Let the worker load its libraries before the first answer; does not wait for it."""
        with contextlib.suppress(OSError):  # the first answer will notice
            self._first = self._first[os.write(self._requests, self._first) :]

    def kill(self) -> None:
        """End the process at once and forget it. May be called twice."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            stream.close()

    def interrupt(self) -> None:
        """SIGKILL without the clean-up: for another thread than the one that asks."""
        self._process.kill()

    def _write(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._requests, select.POLLOUT, until)
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                continue

    def _read(self, size: int, until: float) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            self._wait(self._replies, select.POLLIN, until)
            part = os.read(self._replies, min(size, 1 << 16))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    @staticmethod
    def _wait(descriptor: int, event: int, until: float) -> None:
        poll = select.poll()  # select() would fail on descriptors beyond 1023
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError

    def _epitaph(self, error: Exception) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return f"grader process broke its connection ({type(error).__name__})"
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self._errors.seek(0)
        last_words = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
        return f"grader process {ended}" + (f": {last_words}" if last_words else "")
