"""What a run has left in its folder, and sentences on what it has not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clipo_megatron.config.model_folder import is_run_settings
from clipo_megatron.evaluation.results import Evaluation, read_evaluations
from clipo_megatron.runtime.run_dir import EVALUATIONS, METRICS, ROLLOUTS, SETTINGS, STATES, TRACE
from clipo_megatron.telemetry.sinks import read_lines
from clipo_megatron.telemetry.states import States, file_of, read_states, steps_with_states


class PageError(ValueError):
    """No page can be made; the message says why, and what to give instead."""


@dataclass(frozen=True)
class Accuracy:
    """Held-out problems of one source after some steps."""

    step: int  # steps done
    source: str
    shares: tuple[float, ...]  # one a problem: of its samples that are right

    @property
    def mean(self) -> float:
        """Over problems."""
        return sum(self.shares) / len(self.shares)

    @property
    def interval(self) -> tuple[float, float]:
        """95%: Wilson's for problems answered once, else 1.96 standard errors of the mean over problems."""
        if all(share in (0.0, 1.0) for share in self.shares):
            return wilson(sum(self.shares), len(self.shares))
        return spread_interval(self.shares)


def wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion. Wilson, 1927."""
    share, square = right / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    reach = z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def spread_interval(values: tuple[float, ...], z: float = 1.96) -> tuple[float, float]:
    """`z` standard errors around the mean, within [0, 1]."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return 0.0, 1.0
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return max(0.0, mean - z * error), min(1.0, mean + z * error)


@dataclass
class RunRecord:
    """One run as it stands in its folder."""

    folder: Path
    name: str
    label: str  # what it is called on the page; its name until it stands among others, see grouping.py
    settings: dict[str, Any]  # nested, as config.json has them; {} where there are none
    lines: list[dict[str, Any]]  # metrics.jsonl, by step, each step once
    accuracies: list[Accuracy]  # of the evaluations, by step and source
    evaluations: list[Evaluation]
    groups: list[dict[str, Any]]  # rollouts.jsonl: groups with texts
    traces: list[dict[str, Any]]
    state_steps: list[int]
    missing: list[str] = field(default_factory=list)  # what it has not, as sentences about it

    @property
    def seed(self) -> int | None:
        """Of training; None where it is not known."""
        found = setting(self.settings, "train.seed")
        return found if isinstance(found, int) else None

    @property
    def wanted_steps(self) -> int | None:
        """That the configuration asks for; None where it is not known."""
        return setting(self.settings, "train.steps")

    @property
    def has_clipo(self) -> bool:
        """Whether there is a contrastive head."""
        return any("clipo/loss" in line for line in self.lines) or bool(setting(self.settings, "clipo.enabled"))

    @cached_property
    def metrics(self) -> list[str]:
        """Names, in the order in which they are first seen."""
        return list({name: None for line in self.lines for name in line if name != "step"})

    def values(self, metric: str) -> dict[int, float]:
        """Step -> value of a metric; steps without it, or where it is not finite, are left out."""
        return {
            line["step"]: float(value)
            for line in self.lines
            if isinstance(value := line.get(metric), int | float) and math.isfinite(value)
        }

    def states(self, step: int) -> States | None:
        """The states of a step; None, and a sentence in `missing`, where they cannot be read."""
        try:
            return read_states(file_of(self.folder / STATES, step))
        except ValueError as error:
            self.missing.append(f"{error}.")
            return None

    def texts(self, step: int) -> list[dict[str, Any]]:
        """The groups of a step whose texts are there."""
        return [group for group in self.groups if group["step"] == step]


def read_run(folder: Path) -> RunRecord:
    """All that is there.

    Raises:
        PageError: the folder is no run's, or cannot be read.
    """
    if not folder.is_dir():
        raise PageError(f"{folder} is no folder. Give the folder of a run: its train.output, where metrics.jsonl is")
    try:
        lines = {line["step"]: line for line in read_lines(folder / METRICS)}
        has_file = (folder / METRICS).exists()
        groups, traces = read_lines(folder / ROLLOUTS), read_lines(folder / TRACE)
        settings, no_settings = _settings(folder / SETTINGS)
    except OSError as error:
        raise PageError(f"{folder} cannot be read: {error.strerror or error}. Give the folder of a run") from error
    if not has_file and not settings:
        nothing = f"{folder} has no {METRICS} and no {SETTINGS} of a run"
        raise PageError(f"{nothing}, so it is no run's. Give its train.output")
    name = str(settings.get("name") or folder.resolve().name)
    run = RunRecord(
        folder=folder,
        name=name,
        label=name,
        settings=settings,
        lines=[lines[step] for step in sorted(lines)],
        accuracies=[],
        evaluations=[],
        groups=[group for group in groups if isinstance(group.get("rollouts"), list)],
        traces=[trace for trace in traces if isinstance(trace.get("ranks"), list)],
        state_steps=steps_with_states(folder / STATES),
    )
    if no_settings:
        run.missing.append(f"{no_settings}.")
    _read_evaluations(run)
    _say_what_is_missing(run)
    return run


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    place: Any = settings
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _settings(file: Path) -> tuple[dict[str, Any], str]:
    if not file.exists():
        return {}, f"there is no {SETTINGS}, so its settings are unknown"
    try:
        found = json.loads(file.read_text())
        return (found, "") if is_run_settings(found) else ({}, f"{SETTINGS} is not the configuration of a run")
    except ValueError as error:
        return {}, f"{SETTINGS} cannot be read ({error})"


def _read_evaluations(run: RunRecord) -> None:
    """Those that hold together; one that was damaged costs the page itself alone."""
    run.evaluations += read_evaluations(run.folder / EVALUATIONS)
    unread = len(list((run.folder / EVALUATIONS).glob("step_*.json"))) - len(run.evaluations)
    if unread:
        run.missing.append(f"{unread} of its evaluations cannot be read, or are of an older version.")
    for each in run.evaluations:
        shares: dict[str, list[float]] = {}
        for problem, share in each.correct.items():
            shares.setdefault(problem.rpartition("/")[0], []).append(share)
        run.accuracies += [Accuracy(each.step, source, tuple(shares[source])) for source in sorted(shares)]


def _say_what_is_missing(run: RunRecord) -> None:
    done, wanted = len(run.lines), run.wanted_steps
    last = run.lines[-1]["step"] + 1 if run.lines else 0
    say = run.missing.append
    if not done:
        say("no step is done yet, so it has no curves.")
    elif wanted and last < wanted:
        say(f"{last} of {wanted} steps are done: it is still going, or was ended.")
    if done == 1:
        say("one step is a point, not a curve.")
    raw = run.folder / METRICS
    if raw.exists() and (text := raw.read_bytes()) and not text.endswith(b"\n"):
        say(f"the last line of {METRICS} is cut short and was left out; it is being written, or was lost.")
    if not run.accuracies:
        say("nothing was evaluated (data.eval is empty, or no evaluation is due yet).")
    if done and not run.has_clipo:
        say("it ran without CLIPO, so it has no contrastive loss, bonus, cosines or embeddings.")
    if done and not run.state_steps:
        say("no states were kept (report.save_states = 0, or an older version), so none are mapped.")
    elif len(run.state_steps) == 1 and done > 1:
        say("states of one step only, so there is no before and after yet.")
    if done and not run.groups:
        say("no texts were kept (report.save_rollouts = 0), so no pairs are shown.")
    if done and not run.traces:
        say("no step was traced (report.trace_every = 0, or an older version), so there is no timeline.")
