"""One server's processes: started together, watched through their leader, killed together, and never orphaned."""

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
_GONE_S = 10.0  # that killed processes may take to be gone
_TAIL_BYTES = 64_000

# What the guard of a server runs: it hears nothing until this process is gone, or says that it has ended the group. The
# kernel's own tie to a parent holds the leader alone, and not every engine's other processes follow that.
_GUARD = """
import os, signal, sys
if not sys.stdin.buffer.read(1):
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
"""


class ServerProcess:
    """A running server. It ends with this process, however that ends.

    Args:
        command: what to start.
        log: file that gets its output, after what stands there.
        secrets: words that are replaced in the output.
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
            process_group=0,  # all that it starts can be killed with it
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
        """Of the leader, and of the process group."""
        return self._process.pid

    def ended(self) -> int | None:
        """The leader's exit code (minus the signal's number), None while it runs."""
        return self._process.poll()

    def forget_secret(self) -> None:
        """Delete the file with the key; the server has read it."""
        if self._secret_file:
            self._secret_file.unlink(missing_ok=True)
            self._secret_file = None

    def members(self) -> dict[int, str]:
        """Processes of its group that are alive -> their state as /proc spells it ("T": stopped)."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                state, _parent, group = (place / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if group == str(self.pid) and state not in "ZX":
                found[int(place.name)] = state
        return found

    def terminate(self) -> None:
        """Ask the leader to end; it ends the others."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group, stopped processes included; returns when all are gone."""
        deadline = time.monotonic() + _GONE_S
        while True:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.poll()
            if not self.members() or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):  # it is told again at each kill
            self._guard.communicate(b".", timeout=_GONE_S)
        self._copier.join(1.0)
        self.forget_secret()

    def tail(self) -> str:
        """The end of what this start of the server wrote."""
        self._copier.join(0.5 if self.ended() is not None else 0.0)
        try:
            with self.log.open("rb") as written:
                written.seek(max(self._log_start, self.log.stat().st_size - _TAIL_BYTES))
                lines = written.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        except OSError:
            lines = []
        return "\n".join(f"  | {line[:400]}" for line in lines) or "  | (nothing)"


def _copy(source, log: Path, secrets: Sequence[bytes]) -> None:
    """Line by line into the log, without the secrets; ends when every process has closed its end."""
    with source, log.open("ab", buffering=0) as file:
        for line in source:
            for word in secrets:
                line = line.replace(word, REDACTED.encode())
            with contextlib.suppress(OSError):  # a full disk must not stop the server
                file.write(line)
