"""How far a conversion is: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_S = 10.0


class Meter:
    """Bytes, rate and time left of one phase, and lines of news in between.

    Args:
        enabled: False on ranks that stay silent.
        console: where to; standard error if not given, so that standard output holds results alone.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._phase, self._total, self._began, self._spoke = "", 0, 0.0, 0.0
        self._from: int | None = None

    def say(self, line: str) -> None:
        """One line of news."""
        if self.enabled:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, phase: str, total: int) -> None:
        """Start counting to `total` bytes."""
        self.end()
        self._phase, self._total, self._from = phase, total, None
        self._began = self._spoke = time.monotonic()
        if self.enabled and self.console.is_terminal:
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
        """So many bytes are done; call it as often as you like."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._total))
            return
        now = time.monotonic()
        if self._from is None:
            self._from = done
        if self.enabled and now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            rate = (done - self._from) / max(now - self._began, 1e-6)
            left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "no estimate yet"
            self.say(
                f"{self._phase}: {done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left}",
            )

    def end(self) -> None:
        """The phase is over. Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
