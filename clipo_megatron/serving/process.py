"""The processes of one server, which are started and killed together and never outlive the supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from clipo_megatron.serving.commands import ServerCommand

REDACTED = "<redacted>"
TAIL_LINES = 25
_KILL_S = 10.0  # for killed processes to disappear
_TAIL_BYTES = 64_000

# The guard process of a server kills the process group if the supervisor disappears, which closes the pipe, without
# having sent a byte. A parent-death signal would end the leader only, and some engines' other processes would remain.
_GUARD = """
import os, signal, sys
if not sys.stdin.buffer.read(1):
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
"""


class ServerProcess:
    """A running server, which ends with this process, however that ends.

    Args:
        command: the command to start.
        log: file to which the output is appended.
        secrets: words that are redacted in the output.
    """

    def __init__(self, command: ServerCommand, log: Path, *, secrets: Sequence[str] = ()):
        self.log, self.started_at = log, time.monotonic()
        self._secret_file = None
        log.parent.mkdir(parents=True, exist_ok=True)
        if command.secret_file:
            self._secret_file, text = command.secret_file
            self._secret_file.unlink(missing_ok=True)
            with open(os.open(self._secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
        self._log_start = log.stat().st_size if log.exists() else 0
        self._process = subprocess.Popen(
            command.arguments,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # so that everything it starts can be killed with it
        )
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._copier = threading.Thread(
            target=_copy, args=(self._process.stdout, log, [word.encode() for word in secrets if word]), daemon=True
        )
        self._copier.start()

    @property
    def pid(self) -> int:
        """The id of the leader and of the process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """The leader's exit code (negative: killed by that signal), None while it runs."""
        return self._process.poll()

    def forget_secret(self) -> None:
        """Delete the file with the key, once the server has read it."""
        if self._secret_file:
            self._secret_file.unlink(missing_ok=True)
            self._secret_file = None

    def members(self) -> dict[int, str]:
        """The live processes of the group, each with its state as /proc spells it ("T": stopped)."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                state, _parent, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if group == str(self.pid) and state not in "ZX":
                found[int(process.name)] = state
        return found

    def terminate(self) -> None:
        """Send SIGTERM to the leader, which ends the others."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the whole group, and wait until all its processes are gone."""
        deadline = time.monotonic() + _KILL_S
        while True:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.poll()
            if not self.members() or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):  # an earlier kill may have ended it
            self._guard.communicate(b".", timeout=_KILL_S)
        self._copier.join(1.0)
        self.forget_secret()

    def tail(self) -> str:
        """The last lines that this start of the server wrote."""
        self._copier.join(0.5 if self.exit_code() is not None else 0.0)
        try:
            with self.log.open("rb") as written:
                written.seek(max(self._log_start, self.log.stat().st_size - _TAIL_BYTES))
                lines = written.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        except OSError:
            lines = []
        return "\n".join(f"  | {line[:400]}" for line in lines) or "  | (nothing)"


def _copy(source, log: Path, secrets: Sequence[bytes]) -> None:
    """Copy lines into the log with secrets redacted, until all processes have closed the pipe."""
    with source, log.open("ab", buffering=0) as file:
        for line in source:
            for word in secrets:
                line = line.replace(word, REDACTED.encode())
            with contextlib.suppress(OSError):  # a full disk must not stop the server
                file.write(line)
