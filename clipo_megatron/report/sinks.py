"""Where metrics go: a JSON line a step, and TensorBoard where asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from clipo_megatron.flow import StepReport


class Sink(Protocol):
    """Takes one report a step."""

    def write(self, report: StepReport) -> None:
        """Record it for good."""
        ...

    def close(self) -> None:
        """Flush. Idempotent."""
        ...


class JsonLines:
    """metrics.jsonl: one object a step, in order, never twice; a resumed run drops what its checkpoint does not know."""

    def __init__(self, path: Path, *, from_step: int):
        """Open for steps >= `from_step`; lines of these steps, left by an attempt that died, are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] < from_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)

    def write(self, report: StepReport) -> None:
        """One line."""
        self._file.write(json.dumps({"step": report.step, **report.metrics}) + "\n")

    def close(self) -> None:
        """Flush. Idempotent."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard; needs the `tensorboard` package."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "report.tensorboard is true, but tensorboard is not installed: pip install tensorboard, or turn it off"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, report: StepReport) -> None:
        """Every metric as a scalar."""
        for name, value in report.metrics.items():
            self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        """Flush. Idempotent."""
        self._writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; [] where there is none. A line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
