"""The summary: what ran, held-out accuracy, settings that differ, and what is missing; and the list of all settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import PurePath
from typing import Any

from clipo_megatron.report.chart import SLOTS
from clipo_megatron.report.endings import accuracies_at, ending, sentences
from clipo_megatron.report.grouping import NOT_COMPARED, RunGroup, differences, flat
from clipo_megatron.report.parts import Section, swatch, table
from clipo_megatron.report.reading import Accuracy, RunRecord, setting
from clipo_megatron.report.scales import number, percent, safe, seconds
from clipo_megatron.report.sessions import changed_settings
from clipo_megatron.telemetry.metric_names import STEP_TIME

_MOST_ROWS = 12  # most rows of the table of runs that are shown unfolded


def overview(groups: Sequence[RunGroup]) -> Section:
    notes = "".join(f"<li>{safe(sentence)}</li>" for group in groups for sentence in _missing(group))
    body = (
        f'<div class="tiles">{"".join(_tile(group) for group in groups)}</div>'
        f'<div class="card"><h3>Runs</h3>{_runs(groups)}</div>'
        + _differences(groups)
        + changed_settings(groups)
        + (f'<div class="card below"><h3>What is missing</h3><ul class="notes">{notes}</ul></div>' if notes else "")
    )
    return Section("summary", "Summary", _lead(groups), body)


def settings(groups: Sequence[RunGroup]) -> Section:
    """All settings of every group, folded."""
    parts = []
    for group in groups:
        rows = "".join(
            f"<div><span>{safe(key)}</span><code>{safe(_spelt(value))}</code></div>"
            for key, value in flat(group.first.settings).items()
        )
        if rows:
            seeds = f", as {safe(group.first.label)} had them" if len(group.runs) > 1 else ""
            parts.append(
                f"<details><summary>{swatch(group)}{seeds}</summary><div class=settings>{rows}</div></details>"
            )
    body = f'<div class="card">{"".join(parts)}</div>' if parts else ""
    return Section("settings", "All settings", "As each run wrote them when it started.", body)


def last_accuracies(run: RunRecord) -> list[Accuracy]:
    """The latest accuracy on each source."""
    return list({each.source: each for each in sorted(run.accuracies, key=lambda a: a.step)}.values())


def _missing(group: RunGroup) -> list[str]:
    """Notes on what is missing; one that holds for all runs of a group stands there once."""
    whose: dict[str, list[str]] = {}
    for run in group.runs:
        for sentence in run.missing:
            whose.setdefault(sentence, []).append(run.label)
    everyone = [group.label]
    notes = [
        f"{name}: {sentence}"
        for sentence, names in whose.items()
        for name in (everyone if len(names) == len(group.runs) else names)
    ]
    return notes + sentences(group)


def spread(values: Sequence[float]) -> str:
    """The range over seeds, as "3 seeds, 40.0% to 45.0%"."""
    return f"{len(values)} seeds, {percent(min(values))} to {percent(max(values))}"


def _lead(groups: Sequence[RunGroup]) -> str:
    count = sum(len(group.runs) for group in groups)
    runs = "One run" if count == 1 else f"{count} runs"
    if len(groups) < count:
        runs += f" in {len(groups)} group{'s' * (len(groups) > 1)}: runs that differ only in their seed are one group, "
        runs += "shown as their mean and a band from the least to the largest run"
    return safe(
        f"{runs}. Held-out accuracies are those of the last evaluation, with a 95% interval over problems, or with the "
        "range over seeds."
    )


def _tile(group: RunGroup) -> str:
    if (end := ending(group)) is not None:
        everything = [_overall(accuracies_at(run, end.step)) for run in end.runs]
        value = percent(sum(mean for mean, _ in everything) / len(everything))
        note = f"of held-out problems after {end.step} steps; "
        if len(everything) > 1:
            note += spread([mean for mean, _ in everything])
        else:
            low, high = everything[0][1]
            note += f"95%: {percent(low)} to {percent(high)}"
        note += _before(group, end.step)
    else:
        points = group.points("reward/accuracy")
        value = percent(points[-1].mean) if points else "–"
        note = (
            f"of the rollouts of step {points[-1].step + 1} are correct; nothing was evaluated"
            if points
            else "no step yet"
        )
    return (
        f'<div class="tile c{group.slot % SLOTS}"><div class="what">{swatch(group)}</div>'
        f'<div class="value">{value}</div><div class="note">{safe(note)}</div></div>'
    )


def _before(group: RunGroup, step: int) -> str:
    """What the tile says of the accuracy before training; empty where that was not measured."""
    before = [_overall(found)[0] for run in group.runs if step and (found := accuracies_at(run, 0))]
    return f"; before training {percent(sum(before) / len(before))}" if before else ""


def _overall(accuracies: Sequence[Accuracy]) -> tuple[float, tuple[float, float]]:
    """Accuracy and interval over the problems of all sources together."""
    together = Accuracy(0, "", tuple(share for each in accuracies for share in each.shares))
    return together.mean, together.interval


def _runs(groups: Sequence[RunGroup]) -> str:
    sources = list({a.source: None for group in groups for run in group.runs for a in run.accuracies})
    headings = [
        "run",
        "model",
        "method",
        "ranks",
        "steps",
        *(f"held out: {source}" for source in sources),
        "training time",
    ]
    rows = []
    for group in groups:
        for run in group.runs:
            last = {each.source: each for each in last_accuracies(run)}
            done = run.lines[-1]["step"] + 1 if run.lines else 0
            wanted = f" of {run.wanted_steps}" if run.wanted_steps else ""
            spent = sum(run.values(STEP_TIME).values())
            rows.append(
                [
                    swatch(group, run.label),
                    safe(PurePath(str(setting(run.settings, "model.path") or "–")).name),
                    safe(_method(run)),
                    safe(_ranks(run)),
                    f"{done}{wanted}",
                    *(_accuracy(last.get(source), done) for source in sources),
                    safe(seconds(spent)) if run.lines else "–",
                ]
            )
    shown = table(headings, rows, numbers=range(4, 6 + len(sources)), whole=(3,))
    return f"<details><summary>Show all {len(rows)}</summary>{shown}</details>" if len(rows) > _MOST_ROWS else shown


def _accuracy(found: Accuracy | None, done: int) -> str:
    if found is None:
        return "–"
    low, high = found.interval
    when = f", after {found.step} steps" if found.step != done else ""
    return f'{percent(found.mean)} <span class="aside">{percent(low)} to {percent(high)}{when}</span>'


def _method(run: RunRecord) -> str:
    name = str(setting(run.settings, "algorithm.name") or "–")
    if not setting(run.settings, "clipo.enabled"):
        return name
    weight = setting(run.settings, "clipo.weight")
    shown = f", weight {number(weight)}" if isinstance(weight, int | float) else ""
    return f"{name} + CLIPO ({setting(run.settings, 'clipo.loss')}{shown})"


def _ranks(run: RunRecord) -> str:
    traced = len(run.traces[-1]["ranks"]) if run.traces else None
    sizes = {name: run.count(f"layout.{name}") or 1 for name in ("tp", "cp", "pp")}
    model = prod(sizes.values())
    dp = run.count("layout.dp") or (traced // model if traced else None)
    factors = [f"{name} {size}" for name, size in (*sizes.items(), ("dp", dp)) if size and size > 1]
    split = " × ".join(factors)
    if not dp:
        return split or "–"
    return f"{model * dp} = {split}" if split else "1"


def _differences(groups: Sequence[RunGroup]) -> str:
    """The card of settings that differ; empty for one group, which differs from none."""
    if len(groups) == 1:
        return ""
    known = [group for group in groups if group.first.settings]
    if len(known) < 2:
        return _differences_card('<p class="caption">Settings are known of one group only.</p>')
    rows = [
        [f"<code>{safe(key)}</code>", *(f"<code>{safe(_spelt(value))}</code>" for value in values)]
        for key, values in differences(known)
    ]
    left_out = ", ".join(NOT_COMPARED)
    return _differences_card(
        table(["setting", *(group.label for group in known)], rows)
        + f'<p class="caption">All other settings are the same. Not compared: <code>{safe(left_out)}</code>.</p>'
    )


def _differences_card(content: str) -> str:
    return f'<div class="card below"><h3>Settings that differ</h3>{content}</div>'


def _spelt(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) and value else json.dumps(_given(value), default=str, ensure_ascii=False)


def _given(value: Any) -> Any:
    """A setting without the empty entries of nested mappings."""
    if isinstance(value, dict):
        return {key: _given(each) for key, each in value.items() if each not in (None, "", {}, [])}
    return [_given(each) for each in value] if isinstance(value, list) else value
