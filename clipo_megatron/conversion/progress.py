"""How far a conversion is: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_S = 10.0


class Meter:
    """Shows bytes, rate and remaining time of one phase, on standard error."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._phase, self._total, self._began, self._spoke = "", 0, 0.0, 0.0

    def begin(self, phase: str, total: int) -> None:
        """Start counting to `total` bytes."""
        self.end()
        self._phase, self._total = phase, total
        self._began = self._spoke = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(phase, total=total)
            self._bar.start()

    def show(self, done: int) -> None:
        """Show that `done` bytes are done; may be called at any rate."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._total))
            return
        now = time.monotonic()
        if now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            rate = done / max(now - self._began, 1e-6)
            left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "no estimate yet"
            self.console.print(
                f"{self._phase}: {done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def end(self) -> None:
        """End the phase; calling it again does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
