"""Sinks of metrics: JSON lines and TensorBoard."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from clipo_megatron.config.packages import why
from clipo_megatron.config.ranges import LARGEST_WHOLE
from clipo_megatron.runtime.durable_files import refuse_unreadable, write_durably

if TYPE_CHECKING:
    from clipo_megatron.flow import StepReport

_LARGEST_METRIC = 1e100
_LONGEST_LINE = 1 << 26  # bytes


class MissingPackageError(RuntimeError):
    """The package of a configured sink cannot be used; the message says whether it is missing or broken."""


class ReportError(RuntimeError):
    """A metrics file or service refuses what the run reports; the message says which and why."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A context in which `path` is written.

    Raises:
        ReportError: in place of an OSError, such as that of a full disk.
    """
    try:
        yield
    except OSError as error:
        raise ReportError(
            f"{path} cannot be written: [Errno {error.errno}] {error.strerror}. Free space, or correct train.output; "
            "the same command resumes from the newest checkpoint"
        ) from error


def append(file: TextIO, line: str) -> None:
    """Write a line to an open file; raises ReportError if it cannot be written."""
    with writing(file.name):
        file.write(line)


class Sink(Protocol):
    """Takes the report of each step."""

    def write(self, report: StepReport) -> None:
        """Record a step."""
        ...

    def close(self) -> None:
        """Flush and close. Idempotent."""
        ...


class JsonLines:
    """Writes metrics.jsonl: one JSON object a step, in order and without duplicates, also when a run is resumed.

    A metric that is not finite is written as null, because JSON has no such number.
    """

    def __init__(self, path: Path, *, from_step: int):
        """Open the file for steps >= `from_step`; lines of these steps from an earlier attempt are dropped."""
        keep_before(path, from_step)
        with writing(path):
            self._file = path.open("a", buffering=1)  # the system has the line when `write` returns

    def write(self, report: StepReport) -> None:
        facts = {name: value if math.isfinite(value) else None for name, value in report.metrics.items()}
        append(self._file, json.dumps({"step": report.step, **facts}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes every metric as a TensorBoard scalar; needs the `tensorboard` package."""

    def __init__(self, folder: Path, *, from_step: int):
        """Open the folder for steps >= `from_step`; TensorBoard hides earlier events of these steps.

        Raises:
            MissingPackageError: tensorboard, or something that it needs, is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:
            reason, remedy = why("tensorboard", error)
            raise MissingPackageError(
                f"report.tensorboard is true, but {reason}: {remedy}, or set report.tensorboard=false (metrics.jsonl "
                "has the same numbers)"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=from_step or None)

    def write(self, report: StepReport) -> None:
        for name, value in report.metrics.items():
            self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        self._writer.close()


def keep_before(path: Path, step: int) -> None:
    """Drop the lines of `step` and later ones from a JSON-lines file, and a line cut short by a crash.

    Raises:
        ReportError: the file cannot be written, and is unchanged.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(f"{line}\n" for line, facts in _lines(path) if facts["step"] < step))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, without one cut short by a crash; [] if there is no file.

    Raises:
        ReportError: it is no file, or cannot be read.
    """
    return [facts for _, facts in _lines(path)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with the values that are numbers, or null for what was not finite."""
    return [
        {name: value for name, value in line.items() if value is None or is_number(value)} for line in read_lines(path)
    ]


def is_number(value: Any) -> bool:
    """Whether a value is a number of which many can be added within a double's range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_METRIC


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of steps with their content; a line that is no such thing is passed over."""
    try:
        if not path.exists():
            return
        refuse_unreadable(path)
        with path.open("rb") as file:
            while raw := file.readline(_LONGEST_LINE):
                if len(raw) == _LONGEST_LINE:
                    raise OSError(errno.EFBIG, f"it has a line of {_LONGEST_LINE >> 20} MiB, which no run writes")
                try:
                    facts = json.loads(line := raw.decode().rstrip("\n"))
                except (ValueError, RecursionError):
                    continue
                if isinstance(facts, dict) and type(step := facts.get("step")) is int and 0 <= step <= LARGEST_WHOLE:
                    yield line, facts
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}. Restore it, or remove it.") from error
