"""What `clipo convert verify` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipo_megatron.conversion.compare import Side

if TYPE_CHECKING:
    from clipo_megatron.conversion.verify import VerificationReport

_WIDE = 160  # where nobody says how wide the output is, names are to stay whole


def show(verdict: VerificationReport, most: int, console: Console | None = None) -> None:
    """Print totals, at most `most` differences, and the verdict in one line."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(_totals(verdict))
    found = verdict.comparison
    if found is not None and found.differences:
        console.print()
        console.print(_differences(verdict, most))
        if (more := len(found.differences) - most) > 0:
            console.print(f"and {more} more; --show {len(found.differences)} lists them, --json too")
    lines = [f"{side} is damaged: {each}" for side, defects in verdict.defects.items() for each in defects]
    lines += [f"config.json: {each}" for each in verdict.architecture]
    lines += [f"({each})" for each in verdict.remarks]
    if lines:
        console.print()
        console.print(Text("\n".join(lines)))
    console.print()
    console.print(_last_line(verdict))


def _totals(verdict: VerificationReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "A", "B"):
        table.add_column(name, overflow="fold")
    table.add_row("folder", Text(str(verdict.a)), Text(str(verdict.b)))
    if found := verdict.comparison:
        table.add_row("tensors", f"{found.a.tensors:,}", f"{found.b.tensors:,}")
        table.add_row("bytes", f"{found.a.nbytes:,}", f"{found.b.nbytes:,}")
        table.add_row("dtypes", _dtypes(found.a), _dtypes(found.b))
        table.add_row("equal", f"{found.equal:,}", "")
        table.add_row("different", f"{len(found.differences):,}", "")
    if (logits := verdict.logits) is not None:
        table.add_row(
            "logits", f"largest difference {logits.largest:.3g}", f"{logits.relative:.3g} of the largest logit"
        )
    return table


def _differences(verdict: VerificationReport, most: int) -> Table:
    table = Table(pad_edge=False)
    for name in ("tensor", "A", "B", "difference"):
        table.add_column(name, overflow="fold")
    for each in verdict.comparison.differences[:most] if verdict.comparison else ():
        sides = [Text(str(side)) if side is not None else Text("-") for side in (each.a, each.b)]
        table.add_row(Text(each.name), *sides, Text(each.detail))
    return table


def _dtypes(side: Side) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in side.dtypes.most_common())


def _last_line(verdict: VerificationReport) -> Text:
    took = f"{verdict.seconds:.1f} s"
    if verdict.equal and verdict.comparison:
        checked = "every tensor by its SHA-256" + (", and the logits" if verdict.logits else "")
        return Text(f"equal: {verdict.comparison.equal:,} tensors, {checked} ({took})", style="green")
    reasons = [f"{side} is damaged" for side, defects in verdict.defects.items() if defects]
    if (found := verdict.comparison) is not None and found.differences:
        reasons.append(f"{len(found.differences):,} of {len(found.differences) + found.equal:,} tensors differ")
    if verdict.architecture:
        reasons.append("their config.json describe different models")
    if verdict.logits_error:
        reasons.append(verdict.logits_error)
    elif not verdict.logits_agree:
        reasons.append("the logits differ")
    return Text(f"NOT equal: {'; '.join(reasons)} ({took})", style="red")
