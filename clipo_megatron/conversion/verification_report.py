"""What `clipo convert verify` found, as an object, as JSON and as tables."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipo_megatron.conversion.compare import Fingerprint, SideTotals, TensorComparison
from clipo_megatron.conversion.logits import LogitsDifference

TOLERANCE = 1e-5  # of logits, relative to the largest
_WIDE = 160  # columns of output that is no terminal: names are not wrapped


@dataclass(slots=True)
class VerificationReport:
    """Everything that was found about two folders, A and B."""

    a: Path
    b: Path
    defects: dict[str, list[str]] = field(default_factory=dict)  # what is broken, by side
    comparison: TensorComparison | None = None  # None: a side could not be read at all
    architecture: list[str] = field(default_factory=list)  # facts of config.json that differ
    remarks: list[str] = field(default_factory=list)  # which do not make A and B unequal
    logits: LogitsDifference | None = None
    logits_error: str = ""
    tolerance: float = TOLERANCE
    seconds: float = 0.0

    @property
    def logits_agree(self) -> bool:
        """Tell whether the logits agree within the tolerance, or were not asked for."""
        return not self.logits_error and (self.logits is None or self.logits.relative <= self.tolerance)

    @property
    def equal(self) -> bool:
        """Tell whether A and B are the same model, and both undamaged."""
        return (
            self.comparison is not None
            and not self.comparison.differences
            and not any(self.defects.values())
            and not self.architecture
            and self.logits_agree
        )

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""

        def spell(value: Fingerprint | None) -> dict[str, Any] | None:
            if value is None:
                return None
            return {"sha256": value.sha256, "dtype": _plain(value.dtype), "shape": list(value.shape)}

        found = self.comparison
        return {
            "equal": self.equal,
            "a": {"folder": str(self.a), **(_totals(found.a) if found else {})},
            "b": {"folder": str(self.b), **(_totals(found.b) if found else {})},
            "equal_tensors": found.equal if found else 0,
            "differences": [
                {
                    "name": each.name,
                    "kind": each.kind.value,
                    "detail": each.detail,
                    "a": spell(each.a),
                    "b": spell(each.b),
                }
                for each in (found.differences if found else [])
            ],
            "defects": self.defects,
            "architecture": self.architecture,
            "remarks": self.remarks,
            "logits": asdict(self.logits) | {"relative": self.logits.relative} if self.logits else None,
            "logits_error": self.logits_error,
            "seconds": round(self.seconds, 3),
        }


def show(report: VerificationReport, most: int, console: Console | None = None) -> None:
    """Print totals, at most `most` differences, and the verdict in one line."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(_table_of_totals(report))
    found = report.comparison
    if found is not None and found.differences:
        console.print()
        console.print(_differences(report, most))
        if (more := len(found.differences) - most) > 0:
            console.print(f"and {more} more; --show {len(found.differences)} lists them, --json too")
    lines = [f"{side} is damaged: {each}" for side, defects in report.defects.items() for each in defects]
    lines += [f"config.json: {each}" for each in report.architecture]
    lines += [f"({each})" for each in report.remarks]
    if lines:
        console.print()
        console.print(Text("\n".join(lines)))
    console.print()
    console.print(_last_line(report))


def _table_of_totals(report: VerificationReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "A", "B"):
        table.add_column(name, overflow="fold")
    table.add_row("folder", Text(str(report.a)), Text(str(report.b)))
    if found := report.comparison:
        table.add_row("tensors", f"{found.a.tensors:,}", f"{found.b.tensors:,}")
        table.add_row("bytes", f"{found.a.nbytes:,}", f"{found.b.nbytes:,}")
        table.add_row("dtypes", _dtypes(found.a), _dtypes(found.b))
        table.add_row("equal", f"{found.equal:,}", "")
        table.add_row("different", f"{len(found.differences):,}", "")
    if (logits := report.logits) is not None:
        table.add_row(
            "logits", f"largest difference {logits.largest:.3g}", f"{logits.relative:.3g} of the largest logit"
        )
    return table


def _differences(report: VerificationReport, most: int) -> Table:
    table = Table(pad_edge=False)
    for name in ("tensor", "A", "B", "difference"):
        table.add_column(name, overflow="fold")
    for each in report.comparison.differences[:most] if report.comparison else ():
        sides = [Text(str(side)) if side is not None else Text("-") for side in (each.a, each.b)]
        table.add_row(Text(each.name), *sides, Text(each.detail))
    return table


def _dtypes(side: SideTotals) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in side.dtypes.most_common())


def _last_line(report: VerificationReport) -> Text:
    took = f"{report.seconds:.1f} s"
    if report.equal and report.comparison:
        checked = "every tensor by its SHA-256" + (", and the logits" if report.logits else "")
        return Text(f"equal: {report.comparison.equal:,} tensors, {checked} ({took})", style="green")
    reasons = [f"{side} is damaged" for side, defects in report.defects.items() if defects]
    if (found := report.comparison) is not None and found.differences:
        reasons.append(f"{len(found.differences):,} of {len(found.differences) + found.equal:,} tensors differ")
    if report.architecture:
        reasons.append("their config.json describe different models")
    if report.logits_error:
        reasons.append(report.logits_error)
    elif not report.logits_agree:
        reasons.append("the logits differ")
    return Text(f"NOT equal: {'; '.join(reasons)} ({took})", style="red")


def _totals(side: Any) -> dict[str, Any]:
    return {"tensors": side.tensors, "bytes": side.nbytes, "dtypes": dict(side.dtypes)}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
