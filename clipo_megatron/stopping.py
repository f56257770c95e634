"""How a run is asked to end before its last step: by a signal to any rank, and all ranks leave after the same step."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist


class Stopped(RuntimeError):
    """A run was asked to end before its last step, and has saved its state; `exit_code` is 128 + the signal."""

    def __init__(self, step: int, steps: int, signum: int):
        name = signal.Signals(signum).name if signum else "a request"
        super().__init__(
            f"stopped by {name} after {step} of {steps} steps; the state is saved, and the same command goes on from it"
        )
        self.exit_code = 128 + signum


# Ctrl-C, the end of a job, and what Slurm sends before the end when it is asked to (`--signal=USR1@300`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A signal as a request to end after the step; a second one ends at once, with KeyboardInterrupt.

    Args:
        announce: whether this rank tells the person at the terminal that it was heard.
    """

    def __init__(self, *, announce: bool):
        self.signum = 0  # the signal that asked; 0: none
        self.insisted = False  # whether a second one came: nothing is waited for any more
        self._announce = announce

    def watch(self) -> None:
        """Handle the signals from now on."""
        for name in SIGNALS:
            signal.signal(name, self._hear)

    def agreed(self) -> bool:
        """Whether any rank had been asked when it came here; collective, the same on all of them."""
        flag = torch.tensor([self.signum])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        # A signal may have come meanwhile: it is kept, and all ranks hear of it the next time.
        self.signum = self.signum or int(flag)
        return bool(flag)

    def _hear(self, signum: int, _frame: Any) -> None:
        if self.signum:
            self.insisted = True
            raise KeyboardInterrupt
        self.signum = signum
        if self._announce:  # past the console: the signal may have come while it was printing
            name = signal.Signals(signum).name
            os.write(2, f"{name}: ending after this step; once more to end at once\n".encode())
