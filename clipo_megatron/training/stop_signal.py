"""Ends a run before its last step: a signal reaches any rank, and all ranks stop after the same step."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

GRACE_PERIOD_S = 60.0  # the default of faults.grace_period_s
# Slurm and Kubernetes kill 30 s after SIGTERM unless told otherwise. Rollouts get this much of it, and the checkpoint
# the rest.
TERM_GRACE_S = 5.0
# Ctrl-C; the end of a job; and what Slurm sends before the end if asked to (`--signal=USR1@300`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(RuntimeError):
    """A run ended before its last step because of a signal, and saved its state; `exit_code` is 128 + the signal."""

    def __init__(self, step: int, steps: int, signum: int):
        super().__init__(
            f"stopped by {_name(signum)} after {step} of {steps} steps; the state is saved, and the same command "
            "resumes from it"
        )
        self.exit_code = 128 + signum


class EvaluationStopped(RuntimeError):
    """An evaluation ended without a result because of a signal; `exit_code` is 128 + the signal."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {_name(signum)}; no result is kept, and the same command evaluates again")
        self.exit_code = 128 + signum


class StopSignal:
    """Handles the signals that ask to end. The first one ends the run after its step, the second one at once.

    Args:
        announce: whether this rank prints that it received a signal.
        grace_period_s: time after a signal until generation is cancelled.

    Attributes:
        signum: the signal that any rank received; 0 without one.
        repeated: whether this rank received a second one, so that nothing is waited for any more.
    """

    def __init__(self, *, announce: bool, grace_period_s: float):
        self.signum = 0
        self.repeated = False
        self._received = False  # whether this rank itself has received one
        self._cancel_at = float("inf")
        self._announce, self._grace_period_s = announce, grace_period_s

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Ignore Slurm's warning from now on: it would kill an interpreter that is shutting down."""
        if signal.getsignal(signal.SIGUSR1) == self._handle:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def on_any_rank(self) -> bool:
        """Whether any rank has received a signal; collective, and the same on all ranks."""
        flag = torch.tensor([self.signum])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        # A signal that arrives during the reduction counts the next time, on all ranks.
        self.set_by_other_rank(int(flag))
        return bool(flag)

    def set_by_other_rank(self, signum: int) -> None:
        """Note that another rank received a signal; 0 means that none did."""
        if signum and not self.signum:
            seconds = min(self._grace_period_s, TERM_GRACE_S) if signum == signal.SIGTERM else self._grace_period_s
            self._cancel_at = time.monotonic() + seconds
            self.signum = signum

    def should_cancel(self) -> bool:
        """Whether generation is to be cancelled, because the grace period is over."""
        return time.monotonic() >= self._cancel_at

    def _handle(self, signum: int, _frame: Any) -> None:
        if self._received:
            self.repeated = True
            raise KeyboardInterrupt
        self._received = True
        self.set_by_other_rank(signum)
        if self._announce:  # not through the console, which may be printing when the signal arrives
            line = f"{_name(signum)}: ending after this step; once more to end at once\n"
            os.write(2, line.encode())


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum else "a request"
