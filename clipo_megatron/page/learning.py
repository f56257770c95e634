"""Accuracy on held-out problems, and what is learnt step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clipo_megatron.evaluation.comparing import comparisons, refuse_other_problems
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.results import Evaluation, ProblemResult
from clipo_megatron.page.chart import LEFT, RIGHT, SLOTS, WIDTH, Series, line_chart, svg
from clipo_megatron.page.grouping import RunGroup
from clipo_megatron.page.metric_names import LEARNING, PLACED, other
from clipo_megatron.page.overview import last_accuracies
from clipo_megatron.page.parts import Section, cards, figure, metric_figure, swatch, table
from clipo_megatron.page.reading import Accuracy
from clipo_megatron.page.scales import Scale, number, percent, reach, safe, tick_text, ticks

_ROW = 24


def held_out(groups: Sequence[RunGroup]) -> Section:
    """Accuracy by evaluation set: over steps, and at the end with intervals."""
    sources = list({a.source: None for group in groups for run in group.runs for a in run.accuracies})
    body = cards(
        [_over_steps(groups, source) for source in sources] + ([_at_the_end(groups, sources)] if sources else [])
    )
    body += _paired(groups)
    lead = "Problems that are never trained on, answered by the policy as it stood after so many steps."
    return Section("accuracy", "Held-out accuracy", lead, body)


def learning(groups: Sequence[RunGroup]) -> Section:
    """The curves to look at first."""
    lead = "One line a group, step by step. Point at a curve for its numbers; a name on top hides or shows its group."
    return Section("learning", "Learning curves", lead, cards([metric_figure(groups, metric) for metric in LEARNING]))


def everything_else(groups: Sequence[RunGroup]) -> Section:
    """All metrics that stand nowhere else, folded."""
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


def _at_the_end(groups: Sequence[RunGroup], sources: Sequence[str]) -> str:
    """Every run's latest accuracy and its interval, and the groups' means."""
    rows: list[tuple[str, RunGroup | None, list[Accuracy]]] = []
    for source in sources:
        if len(sources) > 1:
            rows.append((source, None, []))
        for group in groups:
            found = [a for run in group.runs for a in last_accuracies(run) if a.source == source]
            if found:
                rows.append((group.label, group, found))
    limits = [value for _, _, found in rows for each in found for value in each.interval]
    left, height = 150, 14 + _ROW * 1.5 * len(rows) + 42
    across = Scale(*reach(limits, share=True), left, WIDTH - 54)
    parts, bottom = [], height - 42
    marks = ticks(across.low, across.high)
    for value in marks:
        parts.append(f'<path class="grid" d="M{across(value):.1f} 8V{bottom}"/>')
        text = tick_text(value, marks[1] - marks[0], share=True)
        parts.append(f'<text class="tick" x="{across(value):.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    for place, (label, group, found) in enumerate(rows):
        y = 14 + _ROW * 1.5 * (place + 0.5)
        if group is None:
            parts.append(f'<text class="name" x="{LEFT - 50}" y="{y + 8:.1f}">{safe(label)}</text>')
            continue
        parts.append(_row(label, group, found, across, y))
    middle = (across.start + across.end) / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">problems solved</text>')
    caption = (
        "After the last evaluation of each run. Thin bar: the 95% interval of one run over the problems drawn "
        "(Wilson's for problems answered once). Diamond: mean of a group. Intervals of two runs on the same problems "
        "may overlap though the paired difference is clear: compare runs problem by problem."
    )
    return figure("At the end", svg("".join(parts), WIDTH, round(height), label="accuracy at the end"), caption)


def _paired(groups: Sequence[RunGroup]) -> str:
    """What every group gained over the first one, problem by problem; empty where nothing can be paired."""
    with_results = [group for group in groups if any(run.evaluations for run in group.runs)]
    if len(with_results) < 2:
        return ""
    first, *others = with_results
    rows, refused = [], []
    for group in others:
        before, after = _together(first), _together(group)
        try:
            refuse_other_problems(before, after, (first.label, group.label))
        except EvaluationError as error:
            refused.append(str(error))
            continue
        for found in comparisons(before, after):
            points = f"{100 * found.difference:+.1f}".replace("-", "−")
            interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}".replace("-", "−")
            p_value = "–" if found.p_value is None else number(found.p_value, 2)
            rows.append(
                [
                    f"{swatch(group)} over {swatch(first)}",
                    safe(found.source),
                    f"{percent(found.before)} → {percent(found.after)}",
                    f"<b>{points}</b> <span class='aside'>{interval}</span>",
                    f"{found.gained} / {found.lost}",
                    p_value,
                ]
            )
    headings = ["pair", "set", "solved", "points, 95% interval", "gained / lost", "p"]
    caption = (
        "Each group against the first, over the problems that both answered after their last evaluation; the seeds of "
        "a group are further answers to a problem. The interval is the bootstrap's over problems: it says what other "
        "problems would do, not other seeds. p: exact McNemar test, where each problem has one answer a side."
    )
    told = "".join(f"<li>{safe(sentence)}</li>" for sentence in refused)
    shown = table(headings, rows, numbers=(2, 3, 4, 5)) if rows else ""
    notes = f'<ul class="notes">{told}</ul>' if told else ""
    return f'<div class="card below"><h3>Paired differences</h3>{shown}{notes}<p class="caption">{caption}</p></div>'


def _together(group: RunGroup) -> Evaluation:
    """The last evaluations of a group's runs as one, in which a problem has the answers of all seeds."""
    last = [run.evaluations[-1] for run in group.runs if run.evaluations]
    problems: dict[str, ProblemResult] = {}
    for each in last:
        for name, result in each.problems.items():
            held = problems.get(name, replace(result, samples=0, correct=0))
            samples, correct = held.samples + result.samples, held.correct + result.correct
            problems[name] = ProblemResult(samples, correct, digest=result.digest)
    return Evaluation(last[0].step, problems)


def _row(label: str, group: RunGroup, found: Sequence[Accuracy], across: Scale, y: float) -> str:
    parts = [f'<text class="label" x="{RIGHT - 6}" y="{y + 4:.1f}">{safe(_short(label))}</text>']
    for place, each in enumerate(found):
        line = y + (place - (len(found) - 1) / 2) * min(9, 26 / len(found))
        low, high = (across(value) for value in each.interval)
        shown = f"{label}: {percent(each.mean)} of {len(each.shares)}, 95%: "
        tip = shown + f"{percent(each.interval[0])} to {percent(each.interval[1])}"
        parts.append(f'<path class="whisker" d="M{low:.1f} {line:.1f}H{high:.1f}"/>')
        parts.append(f'<circle class="dot" cx="{across(each.mean):.1f}" cy="{line:.1f}" r="4" data-tip="{safe(tip)}"/>')
    mean = sum(each.mean for each in found) / len(found)
    if len(found) > 1:
        x = across(mean)
        parts.append(f'<path class="diamond" d="M{x:.1f} {y - 8:.1f}l7 8l-7 8l-7 -8Z"/>')
    parts.append(f'<text class="value" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{percent(mean)}</text>')
    return f'<g class="series c{group.slot % SLOTS}" data-slot="{group.slot}">{"".join(parts)}</g>'


def _short(label: str, most: int = 20) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"
