"""Building blocks of the sections: figures, cards, tables, curves of a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipo_megatron.report.chart import SLOTS, Series, line_chart
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.metric_titles import Metric
from clipo_megatron.report.scales import safe


@dataclass(frozen=True)
class Section:
    """A section of the report, left out where its body is empty. All fields but `title` are HTML."""

    id: str
    title: str
    lead: str
    body: str


def figure(title: str, drawing: str, caption: str, *, legend: str = "") -> str:
    """A card with a title, a drawing and a caption in HTML."""
    under = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="card"><h3>{safe(title)}</h3>{legend}{drawing}{under}</figure>'


def cards(parts: Sequence[str]) -> str:
    """Cards side by side, as many as fit; empty parts are left out."""
    kept = [part for part in parts if part]
    return f'<div class="cards">{"".join(kept)}</div>' if kept else ""


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), whole: Sequence[int] = ()
) -> str:
    """A table of HTML cells; the columns in `numbers` are aligned to the right, those in `whole` are never broken."""
    special = {0: "name", **dict.fromkeys(whole, "whole"), **dict.fromkeys(numbers, "number")}
    kinds = [special.get(column, "long") for column in range(len(headings))]
    head = "".join(f'<th class="{kind}">{safe(text)}</th>' for kind, text in zip(kinds, headings, strict=True))
    lines = [
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def swatch(group: RunGroup, name: str = "") -> str:
    """A group's colour, and its label or another name."""
    return f'<span class="c{group.slot % SLOTS}"><i class="swatch"></i></span> {safe(name or group.label)}'


def group_series(group: RunGroup, metric: str, *, name: str = "", dashed: bool = False) -> Series | None:
    """A group's metric as a line with a band from the least to the largest of its runs; None without any step."""
    points = group.points(metric)
    if not points:
        return None
    return Series(
        name or group.label,
        group.slot,
        [point.step + 1 for point in points],
        [point.mean for point in points],
        [point.low for point in points] if len(group.runs) > 1 else None,
        [point.high for point in points] if len(group.runs) > 1 else None,
        dashed=dashed,
    )


def metric_figure(groups: Sequence[RunGroup], metric: Metric) -> str:
    """The curves of a metric, for all groups that have it; empty where none has."""
    series = [found for group in groups if (found := group_series(group, metric.name)) is not None]
    if not series:
        return ""
    drawing = line_chart(
        series, y=metric.axis, label=f"{metric.title} ({metric.name})", share=metric.share, zero=metric.zero
    )
    caption = f"{safe(metric.caption)} <code>{safe(metric.name)}</code>" if metric.caption else ""
    return figure(metric.title, drawing, caption)


def stroke(name: str, *, dashed: bool = False) -> str:
    """An entry of a legend: a line and its meaning."""
    pattern = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<span><svg viewBox="0 0 26 10"><path class="stroke" d="M1 5H25"{pattern}/></svg>{safe(name)}</span>'
