"""What a run prints for a person: one line per step, progress within long steps, and tables at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipo_megatron.flow import StepReport
from clipo_megatron.telemetry.metric_names import STEP_TIME, phase_time

# (heading, metric, format) of each column of a step's line; a narrow terminal leaves out the last ones
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "reward/accuracy", "{:.1%}"),
    ("clipo loss", "clipo/loss", "{:.3f}"),
    ("bonus", "clipo/bonus_mean", "{:+.3f}"),
    ("s/step", STEP_TIME, "{:.1f}"),
    ("grad norm", "policy/grad_norm", "{:.2f}"),
    ("mismatch", "policy/mult_prob_error", "{:.4f}"),
    ("tokens", "rollout/response_length", "{:.0f}"),
)
HEADING_EVERY = 20
_CELL, _GAP = 10, "  "


class Progress:
    """Prints one line per step with the time left, in a terminal, a file or a CI log.

    Args:
        total_steps: steps of the whole run.
        enabled: False on ranks that print nothing.
        console: standard output if not given. Lines are cut to the width of a terminal, and nowhere else.
    """

    def __init__(self, total_steps: int, *, enabled: bool = True, console: Console | None = None):
        self.total = total_steps
        self.enabled = enabled
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._durations: list[float] = []
        self._phase = _Countdown(self.console)
        self._minutes = _Countdown(self.console, in_place=False)
        self._shown = 0

    def say(self, message: str) -> None:
        """Print a line."""
        if self.enabled:
            self._phase.clear()
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def rollouts(self, done: int, wanted: int) -> None:
        """Update a line in place while a long step's rollouts come in; only on a terminal."""
        if self.enabled and self.console.is_terminal:
            self._phase.show("rollouts", done, wanted)

    def answers(self, done: int, wanted: int) -> None:
        """Show how far a long evaluation is, and the time left: in place on a terminal, else by a line now and then.

        The last call of an evaluation has `done` equal to `wanted`.
        """
        if self.enabled:
            (self._phase if self.console.is_terminal else self._minutes).show("answers", done, wanted)

    def step(self, report: StepReport) -> None:
        """Print the step's line: its number as in metrics.jsonl, the steps that are done with it, and its metrics, with
        a dash for each that the step does not have."""
        if not self.enabled:
            return
        self._durations = [*self._durations[-9:], report.metrics.get(STEP_TIME, 0.0)]
        left = (self.total - report.step - 1) * sum(self._durations) / len(self._durations)
        columns = self._columns()
        if self._shown % HEADING_EVERY == 0:
            self._line(["step", "done", *(heading for heading, _, _ in columns), "time left"])
        self._shown += 1
        cells = [
            form.format(report.metrics[metric]) if metric in report.metrics else "-" for _, metric, form in columns
        ]
        self._line([str(report.step), f"{report.step + 1}/{self.total}", *cells, duration(left)])

    def _columns(self) -> tuple[tuple[str, str, str], ...]:
        if not self.console.is_terminal:
            return COLUMNS
        fitting = (self.console.width + len(_GAP)) // (
            _CELL + len(_GAP)
        ) - 3  # step, done and time left are always shown
        return COLUMNS[: max(fitting, 2)]

    def _line(self, cells: Sequence[str]) -> None:
        self.say(_GAP.join(f"{cell:>{_CELL}}" for cell in cells))

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose first column is text, which may wrap, and whose other columns are numbers."""
        if not self.enabled:
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self.say(f"\n{title}")
        self.console.print(table, soft_wrap=False)

    def paths(self, paths: Mapping[str, Path]) -> None:
        """Print where things were written."""
        for name, path in paths.items():
            self.say(f"  {name:<12} {path}")


class _Countdown:
    """A line that is overwritten about once a second until something else is printed; or, where nothing can be
    overwritten, a line about twice a minute."""

    PATIENCE_S, EVERY_S = 5.0, 1.0
    LINES_EVERY_S = 30.0

    def __init__(self, console: Console, *, in_place: bool = True):
        self.console, self.in_place = console, in_place
        self._patience_s = self.PATIENCE_S if in_place else self.LINES_EVERY_S
        self._every_s = self.EVERY_S if in_place else self.LINES_EVERY_S
        self._start = self._last = 0.0
        self._done = self._first = 0
        self._width = 0  # of the text on the line

    def show(self, what: str, done: int, wanted: int) -> None:
        now = time.monotonic()
        if (
            done <= self._done or not self._start
        ):  # a new phase; the time of its first result tells nothing about its pace
            self.clear()
            self._start = self._last = now
            self._first = done
        self._done = done
        if done >= wanted:
            self.clear()
        elif now - self._start >= self._patience_s and now - self._last >= self._every_s:
            left = (now - self._start) / max(done - self._first, 1) * (wanted - done)
            self._write(f"{what} {done} of {wanted}, about {duration(left)} left")
            self._last = now

    def clear(self) -> None:
        if self._width:
            self._write("")
            self._width = 0
        self._start = 0.0

    def _write(self, text: str) -> None:
        if not self.in_place:
            if text:
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        text = text[: self.console.width - 1]
        self.console.file.write("\r" + text.ljust(self._width) + ("" if text else "\r"))
        self.console.file.flush()
        self._width = len(text)


def duration(seconds: float) -> str:
    """Seconds in a readable form: 48s, 3m10s, 2h05m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Stopwatch:
    """Measures the phases of one step: `with watch("generate"): ...` gives the metric "time/generate_s".

    Args:
        tell: called with the name of each phase that begins.

    Attributes:
        metrics: seconds by phase.
        spans: (phase, start, end) in order, in seconds since the epoch.
    """

    def __init__(self, tell: Callable[[str], None] = lambda phase: None) -> None:
        self.metrics: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []
        self._tell = tell
        self._start = time.perf_counter()
        self._epoch = time.time() - self._start

    def __call__(self, phase: str) -> _TimedPhase:
        """A context manager that adds its duration to the phase."""
        self._tell(phase)
        return _TimedPhase(self, phase)

    def add(self, phase: str, start: float, end: float) -> None:
        """Add the time between two readings of time.perf_counter() to a phase."""
        name = phase_time(phase)
        self.metrics[name] = self.metrics.get(name, 0.0) + end - start
        self.spans.append((phase, self._epoch + start, self._epoch + end))

    def total(self) -> float:
        """Seconds since construction."""
        return time.perf_counter() - self._start


class _TimedPhase:
    def __init__(self, watch: Stopwatch, phase: str):
        self.watch, self.phase = watch, phase

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.watch.add(self.phase, self.start, time.perf_counter())
