"""Ends a run before its last step: a signal reaches any rank, and all ranks stop after the same step."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from clipo_megatron.runtime.stop_requests import AGAIN_AFTER_S, REQUESTS, StopRequests, signal_name

GRACE_PERIOD_S = 60.0  # the default of faults.grace_period_s
# Slurm and Kubernetes kill 30 s after SIGTERM unless told otherwise. Rollouts get this much of it, and the checkpoint
# the rest.
TERM_GRACE_S = 5.0


class AgreedToStop(RuntimeError):
    """All ranks have agreed to end, because of a signal that any of them received; `exit_code` is 128 + the signal."""

    is_the_same_on_all_ranks = True

    def __init__(self, signum: int, outcome: str):
        super().__init__(f"stopped by {signal_name(signum)}{outcome}")
        self.exit_code = 128 + signum


class Stopped(AgreedToStop):
    """A run ended before its last step, and saved its state."""

    def __init__(self, step: int, steps: int, signum: int):
        outcome = f" after {step} of {steps} steps; the state is saved, and the same command resumes from it"
        super().__init__(signum, outcome)


class StoppedEarly(AgreedToStop):
    """A command on ranks ended before its work began."""

    def __init__(self, signum: int):
        super().__init__(signum, " before the work began; there was nothing to save, and the same command begins it")


class EvaluationStopped(AgreedToStop):
    """An evaluation ended without a result."""

    def __init__(self, signum: int):
        super().__init__(signum, "; no result is kept, and the same command evaluates again")


class StopSignal:
    """What the ranks make of requests to end: the first ends the run after its step, a later one at once.

    Args:
        announce: whether this rank prints that it received a signal.
        grace_period_s: time after a signal until generation is cancelled.
        requests: those that this process receives.
    """

    def __init__(self, *, announce: bool, grace_period_s: float, requests: StopRequests = REQUESTS):
        self._requests, self._grace_period_s = requests, grace_period_s
        self._others, self._others_since = 0, float("inf")  # the signal that another rank received, and when we heard
        requests.on_first = self._announce if announce else None

    @property
    def signum(self) -> int:
        """The signal that any rank received, as far as this one knows; 0 without one."""
        return self._others or self._requests.signum

    @property
    def repeated(self) -> bool:
        """Whether this rank received another one later, so that nothing is waited for any more."""
        return self._requests.count > 1

    def on_any_rank(self) -> bool:
        """Whether any rank has received a signal; collective, and the same on all ranks, as `signum` is then."""
        flag = torch.tensor([self.signum])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        # A signal that arrives during the reduction counts the next time, on all ranks.
        self.set_by_other_rank(int(flag))
        return bool(flag)

    def set_by_other_rank(self, signum: int) -> None:
        """Note that another rank received a signal; 0 means that none did."""
        if signum:
            self._others, self._others_since = signum, min(self._others_since, time.monotonic())

    def should_cancel(self) -> bool:
        """Whether generation is to be cancelled, because the grace period is over."""
        seconds = min(self._grace_period_s, TERM_GRACE_S) if self.signum == signal.SIGTERM else self._grace_period_s
        return time.monotonic() >= min(self._requests.since, self._others_since) + seconds

    @staticmethod
    def _announce(signum: int) -> None:
        # Not through the console, which may be printing when the signal arrives.
        line = f"{signal_name(signum)}: ending after this step; once more after {AGAIN_AFTER_S:g} s to end at once\n"
        os.write(2, line.encode())
