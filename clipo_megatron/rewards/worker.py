"""A grader process: reads answers from its standard input and writes verdicts to its standard output, until input ends.

    python -P -m clipo_megatron.rewards.worker MEMORY_BYTES PARENT_PID SANDBOX

A line of input is a JSON object: {"load": mode}, or {"mode", "deadline_s", "answer": the arguments of `judge`}. For an
answer two lines go out. {"event": "started", "layers": of the sandbox} follows once the libraries of the mode are
loaded, so that the deadline counts grading alone. Then one of {"event": "graded", "score"}, {"event": "failed",
"reason"} and {"event": "misconfigured", "reason"}, each with the "seconds" of grading.

The process enters its sandbox before it reads anything, and loads libraries from within. It never outlives its parent:
the kernel kills it when the parent dies, and an alarm ends an answer that its parent has forgotten.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from functools import cache
from typing import Any, TextIO

from clipo_megatron.config.schema import GraderSandbox
from clipo_megatron.data.asked import Asked
from clipo_megatron.rewards import sandbox
from clipo_megatron.rewards.answer import UnknownGraderError
from clipo_megatron.rewards.modes import describe, judge

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    memory_bytes, parent, choice = int(sys.argv[1]), int(sys.argv[2]), GraderSandbox(sys.argv[3])
    _die_with(parent)
    # Ctrl-C, and what Slurm sends to all processes of a job, is for the parent, which then closes the pool.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = _claim_standard_streams()
    started = json.dumps({"event": "started", "layers": sandbox.enter(choice, memory_bytes=memory_bytes)})
    with contextlib.suppress(BrokenPipeError):
        for line in requests:
            request = json.loads(line)
            if "load" in request:
                _load(request["load"])
            elif not _serve(request, replies, started):
                break


def _serve(request: dict[str, Any], replies: TextIO, started: str) -> bool:
    """Reply to one request, `started` first; False when the process should not judge another answer."""
    _load(request["mode"])
    print(started, file=replies, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 2 * request["deadline_s"] + 5)
    sound, begun = True, time.perf_counter()
    try:
        answer = request["answer"] | {"asked": Asked.of_json(request["answer"]["asked"])}
        reply = {"event": "graded", "score": judge(**answer, mode=request["mode"])}
    except UnknownGraderError as error:
        reply = {"event": "misconfigured", "reason": str(error)}
    except Exception as error:
        reply = {"event": "failed", "reason": describe(error)}
        sound = not isinstance(error, MemoryError)  # what is left of the heap is not worth trusting
    signal.setitimer(signal.ITIMER_REAL, 0)
    _send(replies, {**reply, "seconds": time.perf_counter() - begun})
    return sound


@cache
def _load(mode: str) -> None:
    """Import what `mode` needs, by judging a trivial answer with it."""
    if mode == "reasoning_gym":
        import reasoning_gym  # noqa: F401
    elif mode in ("math", "reference"):
        import math_verify  # noqa: F401

        judge("\\boxed{\\frac{2}{4}}", "0.5 x", data_source="", mode=mode)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":  # elsewhere the end of the input and the alarm end the process
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(0)


def _claim_standard_streams() -> tuple[TextIO, TextIO]:
    """Private handles of the two pipes; what a library prints goes to standard error."""
    requests, replies = (os.fdopen(os.dup(n), mode, encoding="ascii") for n, mode in ((0, "r"), (1, "w")))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=replies, flush=True)


if __name__ == "__main__":
    main()
