"""Where metrics go: a JSON line a step, and TensorBoard where asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from clipo_megatron.runtime.durable_files import write_durably

if TYPE_CHECKING:
    from clipo_megatron.flow import StepReport


class MissingPackageError(RuntimeError):
    """A sink was asked for whose package is not installed."""


class ReportError(RuntimeError):
    """What a run tells cannot be written; the message says where and why."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within, a file is written, or one beside it that takes its name.

    Raises:
        ReportError: the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        raise ReportError(
            f"{path} cannot be written: [Errno {error.errno}] {error.strerror}. Free space, or correct train.output; "
            "the same command goes on from the newest checkpoint"
        ) from error


def append(file: TextIO, line: str) -> None:
    """Write a line to an open file; raises ReportError."""
    with writing(file.name):
        file.write(line)


class Sink(Protocol):
    """Takes one report a step."""

    def write(self, report: StepReport) -> None:
        """Record it for good."""
        ...

    def close(self) -> None:
        """Flush. Idempotent."""
        ...


class JsonLines:
    """metrics.jsonl: one object a step, in order, never twice; a resumed run drops what its checkpoint does not know.

    A metric that is not finite is null: JSON has no word for it.
    """

    def __init__(self, path: Path, *, from_step: int):
        """Open for steps >= `from_step`; lines of these steps, left by an attempt that died, are dropped."""
        keep_before(path, from_step)
        with writing(path):
            self._file = path.open("a", buffering=1)  # a line is with the system when `write` returns

    def write(self, report: StepReport) -> None:
        """One line."""
        facts = {name: value if math.isfinite(value) else None for name, value in report.metrics.items()}
        append(self._file, json.dumps({"step": report.step, **facts}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Flush. Idempotent."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard; needs the `tensorboard` package."""

    def __init__(self, folder: Path, *, from_step: int):
        """Open for steps >= `from_step`; TensorBoard hides older events of these steps.

        Raises:
            MissingPackageError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError(
                "report.tensorboard is true, but the package tensorboard is not installed: pip install tensorboard, "
                "or set report.tensorboard=false (metrics.jsonl has the same numbers)"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=from_step or None)

    def write(self, report: StepReport) -> None:
        """Every metric as a scalar."""
        for name, value in report.metrics.items():
            self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        """Flush. Idempotent."""
        self._writer.close()


def keep_before(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file from `step` on, and one cut short by a crash; the others stay as they are.

    Raises:
        ReportError: the disk is full, say; the file is then as it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(f"{line}\n" for line, facts in _lines(path) if facts["step"] < step))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; [] where there is none. A line cut short by a crash is left out."""
    return [facts for _, facts in _lines(path)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n"):
        try:
            facts = json.loads(line := raw.decode())
        except ValueError:
            continue
        if isinstance(facts, dict) and isinstance(facts.get("step"), int):
            lines.append((line, facts))
    return lines
