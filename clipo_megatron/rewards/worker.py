"""A grader process: reads answers from its standard input, writes verdicts to its standard output, until input ends.

    python -m clipo_megatron.rewards.worker MEMORY_BYTES PARENT_PID

For each answer it first says that it has started, once the libraries of the mode are loaded, so that the deadline
counts grading alone. It never outlives its parent: the kernel kills it when the parent dies, and an alarm ends an
answer that its parent has forgotten.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from functools import cache
from typing import Any, BinaryIO

from clipo_megatron.rewards import frames
from clipo_megatron.rewards.answer import UnknownGraderError
from clipo_megatron.rewards.modes import describe, judge

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FILE_BYTES = 16 << 20


def main() -> None:
    """Serve until the input ends."""
    memory_bytes, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    # Ctrl-C, and what Slurm sends to all processes of a job, is for the parent, which then closes the pool.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force, or macOS, which has no RLIMIT_AS
            resource.setrlimit(limit, (value, value))
    requests, replies = _claim_standard_streams()
    try:
        while True:
            request = frames.read(lambda size: _read_exactly(requests, size))
            if "warm" in request:
                _warm(request["warm"])
                continue
            _serve(request, replies)
    except (EOFError, BrokenPipeError):
        return


def _serve(request: dict[str, Any], replies: BinaryIO) -> None:
    _warm(request["mode"])
    _send(replies, {"event": "started"})
    signal.setitimer(signal.ITIMER_REAL, 2 * request["deadline_s"] + 5)
    spent, begun = False, time.perf_counter()
    try:
        score = judge(
            request["response"],
            request["ground_truth"],
            data_source=request["data_source"],
            mode=request["mode"],
            extra=request["extra"],
        )
        reply = {"event": "graded", "score": score}
    except UnknownGraderError as error:
        reply = {"event": "misconfigured", "reason": str(error)}
    except Exception as error:
        reply = {"event": "failed", "reason": describe(error)}
        spent = isinstance(error, MemoryError)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _send(replies, {**reply, "seconds": time.perf_counter() - begun})
    if spent:  # what is left of the heap is not worth trusting; the pool starts a fresh process
        raise EOFError


@cache
def _warm(mode: str) -> None:
    """Load what `mode` needs by judging a trivial answer with it."""
    if mode == "reasoning_gym":
        import reasoning_gym  # noqa: F401
    elif mode in ("math", "reference"):
        judge("\\boxed{\\frac{2}{4}}", "0.5 x", data_source="", mode=mode)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":  # elsewhere the end of the input and the alarm do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(0)


def _claim_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """Private handles of the two pipes; whatever a library prints goes to standard error."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _send(stream: BinaryIO, message: dict[str, Any]) -> None:
    stream.write(frames.encode(message))
    stream.flush()


if __name__ == "__main__":
    main()
