"""The sandbox of a grader process: what it may still do once it has begun to read answers.

No grader evaluates text, so an answer cannot run as code. Should one do so all the same, through a fault in a library,
then the sandbox leaves it nothing to harm. Each layer is taken where the machine has it, without root:

- *limits*: of memory, of processes, of the size of a file; everywhere.
- *namespaces*: no network device, and no look into processes outside, such as at their environment.
- *Landlock*: of all files, only Python's libraries can be read, and none can be written or run; no connection.
- *seccomp*: system calls by a list of those that computing needs. No process, program, socket, signal or written file.

The process also starts with an environment of its own, in which there is no secret (`process.py`).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache

from clipo_megatron.config.schema import GraderSandbox
from clipo_megatron.rewards.sandbox.calls import allow_computing_only
from clipo_megatron.rewards.sandbox.files import allow_libraries_only, package_parent

NEEDED = ("Landlock", "seccomp")  # without one of them, files, or programs and connections, are within reach
REMEDY = (
    "Run on Linux 5.13 or newer, outside a container that forbids these layers, or set reward.sandbox to auto, which "
    "takes what there is"
)
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000  # linux/sched.h
_FILE_BYTES = 16 << 20  # of standard error, the only file that is open for writing
_OPEN_FILES = 128


class SandboxError(Exception):
    """The run insists on a sandbox that this machine does not have."""


def enter(choice: GraderSandbox, *, memory_bytes: int | None = None) -> tuple[str, ...]:
    """Put this process, which must have one thread, into the sandbox for good; the layers that are in force.

    Args:
        choice: `none` sets the limits alone.
        memory_bytes: limit of the address space.
    """
    layers = ["limits"]
    if choice is not GraderSandbox.none and sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC) == 0:
            layers.append("namespaces")
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if allow_libraries_only(libc):
            layers.append("Landlock")
    _limit(memory_bytes)
    if choice is not GraderSandbox.none and sys.platform == "linux" and allow_computing_only(libc):
        layers.append("seccomp")
    return tuple(layers)


def missing(layers: Sequence[str]) -> str:
    """A sentence on what a process with these layers can still do; "" where nothing is missing."""
    lacking = [layer for layer in NEEDED if layer not in layers]
    if not lacking:
        return ""
    what = {
        "Landlock": "the files of this user can be read",
        "seccomp": "programs and connections are possible",
    }
    return (
        f"graders run without {' and '.join(lacking)}, which this machine does not offer: should a library run an "
        f"answer as code, {' and '.join(what[layer] for layer in lacking)}"
    )


@cache
def layers_of_this_machine() -> tuple[str, ...]:
    """The layers that a grader process on this machine has; found by starting one."""
    try:
        command = python("clipo_megatron.rewards.sandbox")
        done = subprocess.run(command, env=environment(), cwd="/", capture_output=True, timeout=60)
        return tuple(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):  # no process can be started, or the sandbox ends it
        return ()


def environment() -> dict[str, str]:
    """The environment of a grader process: where its libraries are, and nothing else of this process's own."""
    paths = [package_parent(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # threads reserve address space, which is limited
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": tempfile.gettempdir(),  # matplotlib insists on a folder, to which it then writes nothing
    }


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package, where no module can be taken from the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _limit(memory_bytes: int | None) -> None:
    limits = {"RLIMIT_FSIZE": _FILE_BYTES, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": _OPEN_FILES}
    if memory_bytes is not None:
        limits["RLIMIT_AS"] = memory_bytes
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError, AttributeError):  # a lower limit is in force, or the system has no such limit
            continue
