"""The section on time and memory: phases, padding, tokens per second, a step rank by rank, peak memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from clipo_megatron.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, frame, svg
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.metric_titles import PADDING, Metric
from clipo_megatron.report.parts import Section, cards, figure, metric_figure, swatch, table
from clipo_megatron.report.reading import RunRecord
from clipo_megatron.report.scales import Scale, byte_count, percent, reach, safe, seconds, tick_text, ticks
from clipo_megatron.telemetry.metric_names import (
    AGE_MAX,
    AGE_MEAN,
    ALL_PHASES,
    PHASES,
    SPANNING_GROUPS,
    STEP_TIME,
    TOKENS_PER_S,
    phase_time,
)

MOST_RANKS = 64
_MEANING = {
    "generate": "rollouts and their verdicts",
    "exchange": "rollouts sent to the ranks that train on them",
    "score": "old log-probs, pooled states, the head",
    "update": "forward, backward, optimizer",
    "sync": "weight sync to the engine",
    "other": "time outside all phases",
}


def timing(groups: Sequence[RunGroup]) -> Section:
    """The section: phases of all groups, then one traced step of each."""
    speed = Metric(
        TOKENS_PER_S,
        "Tokens per second",
        "tokens / s / rank",
        "Prompt and response tokens of a step, divided by its time.",
    )
    padding = Metric(
        PADDING,
        "Share of padding",
        "padding tokens",
        "Share of the tokens in rank 0's micro-batches. With packing only what tensor parallelism needs is left.",
        share=True,
        zero=True,
    )
    step = Metric(STEP_TIME, "Time of a step", "s", "From the first request to the end of the weight sync.", zero=True)
    most = max((sum(phase_seconds(line)) for group in groups for line in group.first.lines), default=0.0)
    age = Metric(
        AGE_MEAN,
        "Age of tokens",
        "updates",
        "Updates between the weights that drew a token and the step that trained it, mean over the step's tokens.",
        zero=True,
    )
    curves = [metric_figure(groups, each) for each in (step, speed, padding, age)]
    body = cards([*(_phases(group, most) for group in groups), *curves])
    traced = [part for group in groups if (part := _timeline(group))]
    meanings = "; ".join(f"<b>{phase}</b>: {meaning}" for phase, meaning in _MEANING.items())
    lead = (
        f"Where the time of a step goes, by the clock of rank 0; below, one step rank by rank. {meanings}. Checkpoints "
        "and evaluations come between steps and are in none."
    )
    return Section(
        "time",
        "Time and memory",
        lead,
        f'{body}<div class="stack">{"".join(traced)}{_overlap(groups)}{_memory(groups)}</div>' if body else "",
    )


def phase_seconds(line: dict[str, Any]) -> list[float]:
    """Seconds of each phase of ALL_PHASES in a step's metrics; the last is the rest of the step."""
    known = [float(line.get(phase_time(phase)) or 0.0) for phase in PHASES]
    return [*known, max(0.0, float(line.get(STEP_TIME) or 0.0) - sum(known))]


def _phases(group: RunGroup, most: float) -> str:
    """Stacked bars of the phases, one a step or a stretch of steps; the axis reaches `most` seconds."""
    run = group.first
    lines = [(line["step"] + 1, phase_seconds(line)) for line in run.lines if line.get(STEP_TIME)]
    if not lines:
        return ""
    stretch = -(-len(lines) // 120)
    bars = []
    for start in range(0, len(lines), stretch):
        part = lines[start : start + stretch]
        means = [sum(column) / len(part) for column in zip(*(times for _, times in part), strict=True)]
        bars.append((part[0][0], part[-1][0], means))
    across = Scale(bars[0][0] - 0.5, bars[-1][1] + 0.5, LEFT, WIDTH - RIGHT)
    up = Scale(*reach([most], zero=True), HEIGHT - BOTTOM, TOP)
    parts = [frame(across, up, x="step", y="s")]
    for first, last, times in bars:
        left, right = across(first - 0.5), across(last + 0.5)
        gap = min(2.0, (right - left) * 0.15)
        where = f"step {first}" if first == last else f"steps {first} to {last}, mean"
        tip = "\n".join([where, *(f"{p}: {seconds(t)}" for p, t in zip(ALL_PHASES, times, strict=True) if t >= 5e-3)])
        level, pieces = 0.0, []
        for number, spent in enumerate(times):
            top, bottom = up(level + spent), up(level)
            level += spent
            if bottom - top > 0.05:
                pieces.append(
                    f'<rect class="phase{number}" x="{left + gap / 2:.1f}" y="{top:.1f}" '
                    f'width="{right - left - gap:.1f}" height="{bottom - top:.1f}"/>'
                )
        parts.append(f'<g data-tip="{safe(tip)}">{"".join(pieces)}</g>')
    total = [sum(times[number] for _, times in lines) for number in range(len(ALL_PHASES))]
    whole = sum(total) or 1.0
    legend = "".join(
        f'<span title="{_MEANING[phase]}"><i class="phase{n}"></i>{phase} {percent(total[n] / whole, 0)}</span>'
        for n, phase in enumerate(ALL_PHASES)
    )
    name = run.label
    caption = "One bar a step. Percentages are over all steps."
    if stretch > 1:
        caption = f"Each bar is the mean of {stretch} steps. Percentages are over all steps."
    drawing = svg("".join(parts), WIDTH, HEIGHT, label=f"phases of {name}")
    return figure(f"Phases: {name}", drawing, safe(caption), legend=f'<div class="legend">{legend}</div>')


# ---------------------------------------------------------------- one step, rank by rank


def chrome_trace(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """All traced steps in the Trace Event Format of chrome://tracing and Perfetto.

    A run is a process, a rank a thread; times are microseconds since the first span.
    """
    events: list[dict[str, Any]] = []
    for process, run in enumerate(runs):
        spans = [
            (trace["step"], rank, span)
            for trace in run.traces
            for rank, facts in enumerate(trace["ranks"])
            for span in facts.get("spans", [])
        ]
        start = min((span[1] for _, _, span in spans), default=0.0)
        names = {"name": "process_name", "ph": "M", "pid": process, "args": {"name": run.label}}
        events.append(names)
        for rank in sorted({rank for _, rank, _ in spans}):
            named = {"name": "thread_name", "ph": "M", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
            events.append(named)
        for step, rank, (phase, begin, end) in spans:
            events.append(
                {
                    "name": phase,
                    "cat": "phase",
                    "ph": "X",
                    "pid": process,
                    "tid": rank,
                    "ts": round((begin - start) * 1e6, 1),
                    "dur": round((end - begin) * 1e6, 1),
                    "args": {"step": step + 1},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _timeline(group: RunGroup) -> str:
    run = group.first
    trace = next((each for each in reversed(run.traces) if any(r.get("spans") for r in each["ranks"])), None)
    if trace is None:
        return ""
    ranks = trace["ranks"][:MOST_RANKS]
    spans = [span for facts in ranks for span in facts.get("spans", [])]
    start, end = min(span[1] for span in spans), max(span[2] for span in spans)
    width, row, left = 1120, max(10, min(26, 520 // len(ranks))), 64
    height = 12 + row * len(ranks) + BOTTOM
    across = Scale(0.0, max(end - start, 1e-6), left, width - RIGHT)
    parts = _clock(across, height)
    for rank, facts in enumerate(ranks):
        y = 12 + row * rank
        if len(ranks) <= 32 or rank % 8 == 0:
            parts.append(
                f'<text class="tick" x="{left - 8}" y="{y + row / 2 + 4:.1f}" text-anchor="end">rank {rank}</text>'
            )
        for phase, begin, finish in facts.get("spans", []):
            number = ALL_PHASES.index(phase) if phase in ALL_PHASES else len(ALL_PHASES) - 1
            a, b = across(begin - start), across(finish - start)
            tip = (
                f"rank {rank}: {phase}, {seconds(finish - begin)}\nfrom {begin - start:.3f} s to {finish - start:.3f} s"
            )
            parts.append(
                f'<rect class="phase{number}" x="{a:.2f}" y="{y + 1}" width="{max(b - a, 0.4):.2f}" '
                f'height="{row - 2}" rx="2" data-tip="{safe(tip)}"/>'
            )
    legend = "".join(f'<span><i class="phase{n}"></i>{phase}</span>' for n, phase in enumerate(PHASES))
    left_out = f" The first {MOST_RANKS} of {len(trace['ranks'])} ranks." if len(trace["ranks"]) > MOST_RANKS else ""
    name = f"trace-{group.slot}"
    data = json.dumps(chrome_trace([run])).replace("</", "<\\/")
    caption = (
        f"Step {trace['step'] + 1} of {safe(run.label)}, the last one that was traced. Ranks that wait for others "
        "leave a phase together with the slowest one. Times of ranks on different machines differ as their clocks do."
        f"{left_out} All traced steps, for chrome://tracing or Perfetto: "
        f'<button class="switch" data-trace="{name}">Chrome trace</button>'
    )
    drawing = svg("".join(parts), width, height, label="timeline by rank")
    shown = figure(
        f"One step, rank by rank: {run.label}", drawing, caption, legend=f'<div class="legend">{legend}</div>'
    )
    blob = f'<script type="application/json" id="{name}">{data}</script>'
    return f"{shown}{blob}"


def _clock(across: Scale, height: float) -> list[str]:
    marks = ticks(across.low, across.high, 9)
    spacing = marks[1] - marks[0] if len(marks) > 1 else 1.0
    parts = []
    for value in marks:
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} 8V{height - BOTTOM}"/>')
        text = tick_text(value, spacing)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    middle = (across.start + across.end) / 2
    parts.append(
        f'<text class="name" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">s since the step began</text>'
    )
    return parts


def _overlap(groups: Sequence[RunGroup]) -> str:
    """How far generation and training overlapped, of the runs whose rollouts were generated ahead of their step."""
    rows = []
    for group, run in ((each, run) for each in groups for run in each.runs):
        lines = [line for line in run.lines if line.get(AGE_MEAN) is not None and line.get(STEP_TIME)]
        if not lines:
            continue
        waited = sum(line.get(phase_time("generate")) or 0.0 for line in lines)
        oldest = max(line.get(AGE_MAX) or 0.0 for line in lines)
        bound = run.count("rollout.ahead")
        rows.append(
            [
                swatch(group, run.label),
                percent(waited / sum(line[STEP_TIME] for line in lines), 0),
                f"{sum(line[AGE_MEAN] for line in lines) / len(lines):.2f} updates",
                f"{oldest:.0f} of {'an unknown number' if bound is None else bound} allowed",
                percent(sum(line.get(SPANNING_GROUPS) or 0.0 for line in lines) / len(lines), 0),
            ]
        )
    if not rows:
        return ""
    caption = (
        "Servers generated rollouts of later steps while the policy trained (rollout.ahead). Where ranks hardly "
        "waited, training sets the pace and servers have time to spare; where they waited for most of a step, more "
        "servers make it shorter. Older tokens were drawn by weights further from those that they train."
    )
    headings = ["run", "of their time, ranks waited for", "mean age of tokens", "oldest", "groups of several versions"]
    shown = table(headings, rows, numbers=(1, 2, 3, 4))
    return f'<div class="card"><h3>Generation beside training</h3>{shown}<p class="caption">{caption}</p></div>'


def _memory(groups: Sequence[RunGroup]) -> str:
    """Peak memory of the ranks in the traced steps."""
    rows = []
    for group, run in ((each, run) for each in groups for run in each.runs):
        peaks = [(t["step"], [r["peak_memory"] for r in t["ranks"] if r.get("peak_memory")]) for t in run.traces]
        peaks = [(step, each) for step, each in peaks if each]
        if not peaks:
            continue
        (since, first), (step, last) = peaks[0], peaks[-1]
        rows.append(
            [
                swatch(group, run.label),
                f"{byte_count(max(last))} (rank {max(range(len(last)), key=last.__getitem__)})",
                byte_count(sum(last) / len(last)),
                byte_count(min(last)),
                f"{byte_count(max(last) - max(first))} since step {since + 1}" if step > since else "–",
            ]
        )
    if not rows:
        return ""
    caption = (
        "Peak memory of the tensors on a rank's GPU since its start, or of its process on a CPU. "
        "Growth without end is a leak."
    )
    headings = ["run", "largest", "mean of ranks", "smallest", "growth of the largest"]
    shown = table(headings, rows, numbers=(1, 2, 3, 4))
    return f'<div class="card"><h3>Peak memory of the ranks</h3>{shown}<p class="caption">{caption}</p></div>'
