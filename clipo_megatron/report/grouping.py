"""Groups of runs that differ only in their seed, their labels, and the settings in which groups differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path
from typing import Any

from clipo_megatron.report.reading import PageError, RunRecord

# Settings that may differ within a group: names, places, reporting, and what concerns interruptions.
NOT_COMPARED = ("name", "train.seed", "train.output", "report", "checkpoint", "faults", "serve", "rollout.endpoints")
_SEED = re.compile(r"[-_. ]*(seed|s)?[-_. =]*\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """A metric of a group at one step."""

    step: int
    mean: float
    low: float  # least value over its runs
    high: float  # largest value over its runs
    runs: int


@dataclass(frozen=True)
class RunGroup:
    """Runs with the same settings but for the seed. `slot`, the group's place among all, gives its colour."""

    label: str
    slot: int
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """The run that stands for the group where only one can be shown."""
        return self.runs[0]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of all runs."""
        return list({name: None for run in self.runs for name in run.metrics})

    def points(self, metric: str) -> list[Point]:
        """Mean, least and largest value over the group's runs, by step."""
        values = [run.values(metric) for run in self.runs]
        if len(values) == 1:
            return [Point(step, value, value, value, 1) for step, value in values[0].items()]
        steps = sorted({step for each in values for step in each})
        found = [(step, [each[step] for each in values if step in each]) for step in steps]
        return [Point(step, sum(v) / len(v), min(v), max(v), len(v)) for step, v in found]


def group_runs(runs: Sequence[RunRecord]) -> list[RunGroup]:
    """The groups of `runs`, in their order. A run whose settings are unknown is a group of its own.

    Labels are unique. A group takes its runs' name, with its folder where another group has that name. A run takes its
    name; where another run has it, its group's label with its seed, or with its folder.
    """
    together: dict[str, list[RunRecord]] = {}
    for number, run in enumerate(runs):
        compared = {key: value for key, value in flat(run.settings).items() if not _ignored(key)}
        key = json.dumps(compared, sort_keys=True, default=str) if run.settings else f"run {number}"
        together.setdefault(key, []).append(run)
    members = [tuple(sorted(each, key=_seed)) for each in together.values()]
    labels = [_label(each) for each in members]
    for label in {each for each in labels if labels.count(each) > 1}:
        alike = [number for number, each in enumerate(labels) if each == label]
        places = _apart([Path(commonpath([run.folder.resolve() for run in members[number]])) for number in alike])
        for count, number in enumerate(alike):
            labels[number] = f"{label} ({places[count] if places else count + 1})"
    names = [run.name for run in runs]
    return [
        RunGroup(label, slot, _labelled(label, each, names))
        for slot, (label, each) in enumerate(zip(labels, members, strict=True))
    ]


def against(groups: Sequence[RunGroup], name: str) -> list[RunGroup]:
    """`groups` with the one labelled `name` first, so that the others are compared with it.

    Raises:
        PageError: no group has this label.
    """
    chosen = [group for group in groups if group.label == name]
    if not chosen:
        known = ", ".join(group.label for group in groups)
        raise PageError(f"--against {name}: no group has this label. Give one of: {known}")
    ordered = [*chosen, *(group for group in groups if group.label != name)]
    return [replace(group, slot=slot) for slot, group in enumerate(ordered)]


def differences(groups: Sequence[RunGroup]) -> list[tuple[str, list[Any]]]:
    """Settings that differ between groups: (key, its value in each group)."""
    settings = [flat(group.first.settings) for group in groups]
    keys = list({key: None for each in settings for key in each})
    rows = [(key, [each.get(key) for each in settings]) for key in keys if not _ignored(key)]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _ignored(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NOT_COMPARED)


def _seed(run: RunRecord) -> int:
    return run.seed or 0


def _labelled(label: str, runs: Sequence[RunRecord], names: Sequence[str]) -> tuple[RunRecord, ...]:
    """A group's runs with their labels; `names` are the names of all runs in the report."""
    if len(runs) == 1:
        return (replace(runs[0], label=label),)
    if all(names.count(run.name) == 1 for run in runs):
        return tuple(replace(run, label=run.name) for run in runs)
    seeds = [run.seed for run in runs]
    if None not in seeds and len(set(seeds)) == len(seeds):
        return tuple(replace(run, label=f"{label}, seed {run.seed}") for run in runs)
    places = _apart([run.folder.resolve() for run in runs]) or [str(number + 1) for number in range(len(runs))]
    return tuple(replace(run, label=f"{label}, {place}") for run, place in zip(runs, places, strict=True))


def _apart(paths: Sequence[Path]) -> list[str] | None:
    """The shortest endings of the paths that are all different; None where two paths are the same."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        ends = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(ends)) == len(ends):
            return ends
    return None


def _label(runs: Sequence[RunRecord]) -> str:
    names = list(dict.fromkeys(run.name for run in runs))
    if len(runs) == 1 or len(names) == 1:
        return names[0]
    stems = {_SEED.sub("", name) or name for name in names}
    return stems.pop() if len(stems) == 1 else " / ".join(names)
