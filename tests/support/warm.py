"""Processes that start warm: forks of one that has imported torch, Megatron and the trainer already.

Importing them costs a process seven seconds of CPU time. The fork server, one a test session, is that of
`multiprocessing`; it has a single thread. A forked command is a faithful stand-in for a started one: it leads a session
of its own, /proc shows its own environment and command line, and its ranks are its children.

What forks do not show: they share the seed of string hashes. The run that most others are compared with starts cold.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, process, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

PRELOADED = "warm_imports"
# Room in the server's environment for those of its forks, which are written over it.
ROOM = {"CLIPO_TEST_ROOM": "x" * 16_384}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
IMPORT = "CLIPO_TEST_IMPORT"  # a module that changes something of the command on purpose
MODULE = ("-m", "clipo_megatron.cli")


def context() -> ForkServerContext:
    """Where processes start as forks of the server, which is started when first asked for."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload([PRELOADED])
    before = dict(os.environ)
    os.environ.update(ROOM | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return found


class Command:
    """`python -m clipo_megatron.cli ...` in a fork; it is asked and ended as a `subprocess.Popen` is."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], log: Path):
        # A daemon, for what a failed test leaves to end with the session; `_command` forgets that it is one.
        target = (list(arguments), dict(env), str(log))
        self._process = context().Process(target=_command, args=target, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _command(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The life of a forked command, whose ranks are forked too."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    _give_files(output, output)
    process._parent_process, process._current_process = None, sys.modules[PRELOADED].MAIN_PROCESS
    subprocess.Popen = _forking(subprocess.Popen)
    _live(arguments, environment)


def _forking(started: type[subprocess.Popen]) -> Callable[..., Any]:
    """Popen, but for the ranks of a command, which are forked."""

    def popen(arguments: Sequence[str], *rest: Any, **options: Any) -> Any:
        if list(arguments[:3]) == [sys.executable, *MODULE]:
            return _Rank(arguments[3:], *rest, **options)
        return started(arguments, *rest, **options)

    return popen


class _Rank:
    """A forked rank, as far as `launch.supervise` uses a Popen."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: BinaryIO | None,
        stderr: BinaryIO | None,
        process_group: int,
        preexec_fn: Callable[[], None] | None,
    ):
        assert stdin == subprocess.DEVNULL
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, process_group)
            _give_files(stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2)
            if preexec_fn is not None:
                preexec_fn()
            _live(list(arguments), dict(env))

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _give_files(stdout: int, stderr: int) -> None:
    """Take these as standard streams, and close all other files, as a process does that is started."""
    for wanted, file in enumerate((os.open(os.devnull, os.O_RDONLY), stdout, stderr)):
        os.dup2(file, wanted)
    os.closerange(3, 4096)
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None


def _live(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Run the command and end, as an interpreter does."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _show([sys.executable, *MODULE, *arguments], environment)
        os.environ.update(environment)
        for name, file in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, open(file, "w", buffering=1, closefd=False))  # noqa: SIM115
        if "PYTHONFAULTHANDLER" in environment:
            faulthandler.enable(2)
        if IMPORT in environment:
            importlib.import_module(environment[IMPORT])
        from clipo_megatron.cli.__main__ import start
        from clipo_megatron.runtime.stop_requests import REQUESTS

        sys.argv = ["clipo", *arguments]
        REQUESTS.__init__()  # a process that is started has received none
        code = start()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _show(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write command line and environment over those that /proc shows of this process."""
    os.environ.clear()  # nothing points there any more
    fields = [int(field) for field in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1:]]
    for (first, last), texts in (
        (fields[44:46], words),
        (fields[46:48], [f"{name}={value}" for name, value in environment.items()]),
    ):
        block = b"".join(os.fsencode(text) + b"\0" for text in texts)[: last - first - 1]
        ctypes.memmove(first, block.ljust(last - first, b"\0"), last - first)
