"""The sections on held-out accuracy, learning curves and all other metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clipo_megatron.report.chart import HEIGHT, RIGHT, SLOTS, WIDTH, Series, line_chart, svg
from clipo_megatron.report.endings import accuracies_at, ending
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.metric_titles import LEARNING, PLACED, other
from clipo_megatron.report.pairing import paired
from clipo_megatron.report.parts import Section, cards, figure, metric_figure
from clipo_megatron.report.reading import Accuracy
from clipo_megatron.report.scales import Scale, percent, reach, safe, tick_text, ticks

_ROW = 36
_BESIDE = 9.0  # pixels between the bars of two groups at the same step


def held_out(groups: Sequence[RunGroup]) -> Section:
    """Accuracy on each evaluation set: over steps, and at the end with intervals."""
    sources = list({a.source: None for group in groups for run in group.runs for a in run.accuracies})
    body = cards([drawn for source in sources for drawn in (_over_steps(groups, source), _at_the_end(groups, source))])
    body += paired(groups)
    lead = "Problems that are never trained on, answered by the policy after a number of steps."
    return Section("accuracy", "Held-out accuracy", lead, body)


def learning(groups: Sequence[RunGroup]) -> Section:
    """The section on the metrics to look at first."""
    lead = "One line a group, step by step. Point at a curve for its numbers; a name on top hides or shows its group."
    return Section("learning", "Learning curves", lead, cards([metric_figure(groups, metric) for metric in LEARNING]))


def everything_else(groups: Sequence[RunGroup]) -> Section:
    """All metrics that no other section shows, folded."""
    names = [name for name in {n: None for group in groups for n in group.metrics} if name not in PLACED]
    names.sort(key=lambda name: (name.startswith("time/"), name.partition("/")[0]))
    found = [metric_figure(groups, other(name)) for name in names]
    shown = cards([each for each in found if each])
    body = f"<details><summary>Show {len(names)} more</summary>{shown}</details>" if shown else ""
    return Section("metrics", "All other metrics", "As metrics.jsonl has them.", body)


def _over_steps(groups: Sequence[RunGroup], source: str) -> str:
    series = []
    for group in groups:
        by_step: dict[int, list[Accuracy]] = {}
        for run in group.runs:
            for each in run.accuracies:
                if each.source == source:
                    by_step.setdefault(each.step, []).append(each)
        if not by_step:
            continue
        steps = sorted(by_step)
        alone = len(group.runs) == 1
        means = [[each.mean for each in by_step[step]] for step in steps]
        low = [by_step[step][0].interval[0] if alone else min(m) for step, m in zip(steps, means, strict=True)]
        high = [by_step[step][0].interval[1] if alone else max(m) for step, m in zip(steps, means, strict=True)]
        averages = [sum(each) / len(each) for each in means]
        series.append(Series(group.label, group.slot, steps, averages, low, high, marks=True))
    series = [replace(each, shift=_BESIDE * (place - (len(series) - 1) / 2)) for place, each in enumerate(series)]
    problems = sorted({len(a.shares) for g in groups for run in g.runs for a in run.accuracies if a.source == source})
    drawing = line_chart(
        series, y="problems solved", x="steps done", label=f"accuracy on {source}", share=True, zero=True, smooth=False
    )
    several = any(len(group.runs) > 1 for group in groups)
    single = any(len(group.runs) == 1 for group in groups)
    bars = " ".join(
        ["Bars: the least to the largest seed."] * several
        + ["Bars of a single run: 95% interval over problems."] * single
    )
    return figure(f"{source} over steps", drawing, f"{' or '.join(map(str, problems))} problems. {bars}")


def _at_the_end(groups: Sequence[RunGroup], source: str) -> str:
    """Accuracy of every run after the last step that its group has evaluated, with intervals and the groups' means."""
    rows: list[tuple[RunGroup, int, list[tuple[str, Accuracy]]]] = []
    for group in groups:
        if (end := ending(group)) is None:
            continue
        found = [(run.label, a) for run in end.runs for a in accuracies_at(run, end.step) if a.source == source]
        if found:
            rows.append((group, end.step, found))
    if not rows:
        return ""
    limits = [value for _, _, found in rows for _, each in found for value in each.interval]
    height = max(HEIGHT, 14 + _ROW * len(rows) + 42)
    across = Scale(*reach(limits, share=True), 150, WIDTH - 54)
    parts, bottom = [], height - 42
    marks = ticks(across.low, across.high)
    for value in marks:
        parts.append(f'<path class="grid" d="M{across(value):.1f} 8V{bottom}"/>')
        text = tick_text(value, marks[1] - marks[0], share=True)
        parts.append(f'<text class="tick" x="{across(value):.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    room = (bottom - 14) / len(rows)
    parts += [
        _row(group, found, across, 14 + room * (place + 0.5), min(room, 60.0))
        for place, (group, _, found) in enumerate(rows)
    ]
    middle = (across.start + across.end) / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">problems solved</text>')
    steps = " or ".join(map(str, sorted({step for _, step, _ in rows})))
    several = "Diamond: mean of a group. " if any(len(found) > 1 for *_, found in rows) else ""
    caption = (
        f"After {steps} steps. Dot and bar: one run and its 95% interval over problems. {several}Intervals of two runs "
        "on the same problems may overlap though the paired difference is clear."
    )
    drawing = svg("".join(parts), WIDTH, round(height), label=f"accuracy on {source} at the end")
    return figure(f"{source} at the end", drawing, caption)


def _row(group: RunGroup, found: Sequence[tuple[str, Accuracy]], across: Scale, y: float, room: float) -> str:
    parts = [f'<text class="label" x="{RIGHT - 6}" y="{y + 4:.1f}">{safe(_short(group.label))}</text>']
    for place, (label, each) in enumerate(found):
        line = y + (place - (len(found) - 1) / 2) * min(9, (room - 10) / len(found))
        low, high = (across(value) for value in each.interval)
        tip = f"{label}: {percent(each.mean)} of {len(each.shares)}, 95%: "
        tip += f"{percent(each.interval[0])} to {percent(each.interval[1])}"
        parts.append(f'<path class="whisker" d="M{low:.1f} {line:.1f}H{high:.1f}"/>')
        parts.append(f'<circle class="dot" cx="{across(each.mean):.1f}" cy="{line:.1f}" r="4" data-tip="{safe(tip)}"/>')
    mean = sum(each.mean for _, each in found) / len(found)
    if len(found) > 1:
        parts.append(f'<path class="diamond" d="M{across(mean):.1f} {y - 8:.1f}l7 8l-7 8l-7 -8Z"/>')
    parts.append(f'<text class="value" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{percent(mean)}</text>')
    return f'<g class="series c{group.slot % SLOTS}" data-slot="{group.slot}">{"".join(parts)}</g>'


def _short(label: str) -> str:
    return label if len(label) <= 20 else f"{label[:19]}…"
