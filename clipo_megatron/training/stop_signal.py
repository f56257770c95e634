"""How a run is asked to end before its last step: by a signal to any rank, and all ranks leave after the same step."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

GRACE_PERIOD_S = 60.0  # faults.grace_period_s, unless it is set
# Who sends TERM kills soon after: Slurm and Kubernetes after 30 s, unless told otherwise. Of these, a step that
# generates gets so many, and the checkpoint the rest.
TERM_S = 5.0


class Stopped(RuntimeError):
    """A run was asked to end before its last step, and has saved its state; `exit_code` is 128 + the signal."""

    def __init__(self, step: int, steps: int, signum: int):
        super().__init__(
            f"stopped by {_name(signum)} after {step} of {steps} steps; the state is saved, and the same command goes "
            "on from it"
        )
        self.exit_code = 128 + signum


class EvaluationStopped(RuntimeError):
    """An evaluation was asked to end, and has no result; `exit_code` is 128 + the signal."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {_name(signum)}; nothing is kept, and the same command evaluates again")
        self.exit_code = 128 + signum


# Ctrl-C, the end of a job, and what Slurm sends before the end when it is asked to (`--signal=USR1@300`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A signal as a request to end after the step; a second one ends at once, with KeyboardInterrupt.

    Args:
        announce: whether this rank tells the person at the terminal that it was heard.
        patience_s: for what generates then, after which it is to be given up.
    """

    def __init__(self, *, announce: bool, patience_s: float):
        self.signum = 0  # the signal that asked; 0: none
        self.insisted = False  # whether a second one came: nothing is waited for any more
        self._here = False  # whether this rank got one
        self._give_up_at = float("inf")
        self._announce, self._patience_s = announce, patience_s

    def watch(self) -> None:
        """Handle the signals from now on."""
        for name in SIGNALS:
            signal.signal(name, self._hear)

    def leave(self) -> None:
        """The process ends: Slurm's warning needs no answer, and an interpreter that shuts down would die of it."""
        if signal.getsignal(signal.SIGUSR1) == self._hear:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def agreed(self) -> bool:
        """Whether any rank had been asked when it came here; collective, the same on all of them."""
        flag = torch.tensor([self.signum])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        # A signal may have come meanwhile: it is kept, and all ranks hear of it the next time.
        self.hear_of(int(flag))
        return bool(flag)

    def hear_of(self, signum: int) -> None:
        """That another rank got a signal; 0: none did."""
        if signum and not self.signum:
            patience = min(self._patience_s, TERM_S) if signum == signal.SIGTERM else self._patience_s
            self._give_up_at = time.monotonic() + patience
            self.signum = signum

    def should_cancel(self) -> bool:
        """Whether what still generates is to be given up."""
        return time.monotonic() >= self._give_up_at

    def _hear(self, signum: int, _frame: Any) -> None:
        if self._here:
            self.insisted = True
            raise KeyboardInterrupt
        self._here = True
        self.hear_of(signum)
        if self._announce:  # past the console: the signal may have come while it was printing
            said = f"{_name(signum)}: ending after this step; once more to end at once\n"
            os.write(2, said.encode())


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum else "a request"
