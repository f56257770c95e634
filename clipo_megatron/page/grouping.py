"""Runs that differ only in their seed are one group; what sets the groups apart; metrics of a group by step."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipo_megatron.page.reading import RunRecord

# What may differ between seeds of one group: names, places, what is told, and how it goes on after a stop.
NOT_COMPARED = ("name", "train.seed", "train.output", "report", "checkpoint", "faults", "serve", "rollout.endpoints")
_SEED = re.compile(r"[-_. ]*(seed|s)?[-_. =]*\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """A metric of a group in one step."""

    step: int
    mean: float
    low: float  # the least of its runs
    high: float
    runs: int


@dataclass(frozen=True)
class RunGroup:
    """Runs with the same settings but for the seed. `slot` is the group's place among all, which gives its colour."""

    label: str
    slot: int
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """The run that stands for the group where only one can be shown."""
        return self.runs[0]

    @property
    def metrics(self) -> list[str]:
        """Names, of all runs."""
        return list({name: None for run in self.runs for name in run.metrics})

    def points(self, metric: str) -> list[Point]:
        """Mean, least and largest over the group's runs, by step."""
        values = [run.values(metric) for run in self.runs]
        if len(values) == 1:
            return [Point(step, value, value, value, 1) for step, value in values[0].items()]
        steps = sorted({step for each in values for step in each})
        found = [(step, [each[step] for each in values if step in each]) for step in steps]
        return [Point(step, sum(v) / len(v), min(v), max(v), len(v)) for step, v in found]

    def total(self, metric: str) -> float:
        """Sum over steps, mean over runs."""
        return sum(sum(run.values(metric).values()) for run in self.runs) / len(self.runs)


def group_runs(runs: Sequence[RunRecord]) -> list[RunGroup]:
    """In the order in which they were given. A run whose settings are unknown stands alone."""
    together: dict[str, list[RunRecord]] = {}
    for number, run in enumerate(runs):
        compared = {key: value for key, value in flat(run.settings).items() if not _ignored(key)}
        key = json.dumps(compared, sort_keys=True, default=str) if run.settings else f"run {number}"
        together.setdefault(key, []).append(run)
    members = [tuple(sorted(each, key=_seed)) for each in together.values()]
    labels = [_label(each) for each in members]
    taken: dict[str, int] = {}
    for number, label in enumerate(labels):
        if labels.count(label) > 1:
            taken[label] = taken.get(label, 0) + 1
            labels[number] = f"{label} ({taken[label]})"
    return [RunGroup(label, slot, each) for slot, (label, each) in enumerate(zip(labels, members, strict=True))]


def differences(groups: Sequence[RunGroup]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all groups: (key, a value a group)."""
    settings = [flat(group.first.settings) for group in groups]
    keys = list({key: None for each in settings for key in each})
    rows = [(key, [each.get(key) for each in settings]) for key in keys if not _ignored(key)]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
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
    seed = run.settings.get("train", {}).get("seed", 0) if isinstance(run.settings.get("train"), dict) else 0
    return seed if isinstance(seed, int) else 0


def _label(runs: Sequence[RunRecord]) -> str:
    names = list(dict.fromkeys(run.name for run in runs))
    if len(runs) == 1 or len(names) == 1:
        return names[0]
    stems = {_SEED.sub("", name) or name for name in names}
    return stems.pop() if len(stems) == 1 else " / ".join(names)
