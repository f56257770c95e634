"""Reads the folder of a run, and notes what is missing there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clipo_megatron.config.model_folder import is_run_settings
from clipo_megatron.evaluation.estimators import mean_and_error
from clipo_megatron.evaluation.results import Evaluation, read_evaluations
from clipo_megatron.report.lines import is_group, is_trace
from clipo_megatron.runtime.durable_files import text_of
from clipo_megatron.runtime.run_dir import EVALUATIONS, METRICS, ROLLOUTS, SETTINGS, STATES, STEP_NAMES, TRACE
from clipo_megatron.telemetry.segments import RunSegment, read_segments
from clipo_megatron.telemetry.sinks import ReportError, read_lines, read_metrics
from clipo_megatron.telemetry.states import States, file_of, read_states, steps_with_states

Z_95 = 1.96  # standard deviations on either side that hold 95% of a normal distribution


class PageError(ValueError):
    """The report cannot be made; the message says why, and what to give instead."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the held-out problems of one source, after a number of steps."""

    step: int  # steps done
    source: str
    shares: tuple[float, ...]  # for each problem, the share of its samples that are correct

    @property
    def mean(self) -> float:
        return sum(self.shares) / len(self.shares)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval: Wilson's for problems answered once, else 1.96 standard errors of the mean over problems."""
        if all(share in (0.0, 1.0) for share in self.shares):
            return wilson(sum(self.shares), len(self.shares))
        mean, error = mean_and_error(self.shares)
        return (0.0, 1.0) if error is None else (max(0.0, mean - Z_95 * error), min(1.0, mean + Z_95 * error))


def wilson(correct: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), 95%."""
    share, square = correct / count, Z_95**2 / count
    middle = (share + square / 2) / (1 + square)
    reach = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)


@dataclass
class RunRecord:
    """What the folder of one run contains."""

    folder: Path
    name: str
    label: str  # unique in the report; the name until grouping.py changes it
    settings: dict[str, Any]  # config.json, nested; {} where it is missing or damaged
    lines: list[dict[str, Any]]  # metrics.jsonl, by step, each step once
    accuracies: list[Accuracy]  # from the evaluations, by step and source
    evaluations: list[Evaluation]
    groups: list[dict[str, Any]]  # rollouts.jsonl: groups of rollouts with their texts
    traces: list[dict[str, Any]]  # trace.jsonl, one entry a traced step
    state_steps: list[int]  # steps whose pooled states were kept
    segments: list[RunSegment] = field(default_factory=list)  # its sessions, with their settings
    missing: list[str] = field(default_factory=list)  # notes on what is missing

    @property
    def seed(self) -> int | None:
        """Seed of the training; None where it is not known."""
        return self.count("train.seed")

    @property
    def wanted_steps(self) -> int | None:
        """Number of steps that the configuration asks for; None where it is not known."""
        return self.count("train.steps")

    def count(self, key: str) -> int | None:
        """A setting that is a whole number; None where it is not known, or something else."""
        found = setting(self.settings, key)
        return found if type(found) is int and 0 <= found < 1 << 63 else None

    @property
    def has_clipo(self) -> bool:
        """Whether the run has a contrastive head."""
        return any("clipo/loss" in line for line in self.lines) or bool(setting(self.settings, "clipo.enabled"))

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of their first appearance."""
        return list({name: None for line in self.lines for name in line if name != "step"})

    def values(self, metric: str) -> dict[int, float]:
        """Values of a metric by step; steps where it is missing or not finite are left out."""
        return {
            line["step"]: float(value)
            for line in self.lines
            if isinstance(value := line.get(metric), int | float) and math.isfinite(value)
        }

    def states(self, step: int) -> States | None:
        """The states of a step; None, and a note in `missing`, where they cannot be read."""
        try:
            return read_states(file_of(self.folder / STATES, step))
        except ValueError as error:
            self.missing.append(f"{error}.")
            return None

    def texts(self, step: int) -> list[dict[str, Any]]:
        """The groups of a step whose texts were kept."""
        return [group for group in self.groups if group["step"] == step]


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        PageError: the folder is not that of a run, or cannot be read.
    """
    if not folder.is_dir():
        raise PageError(f"{folder} is not a folder. Give the folder of a run, its train.output, where metrics.jsonl is")
    try:
        lines = {line["step"]: line for line in read_metrics(folder / METRICS)}
        has_file = (folder / METRICS).exists()
        groups, traces = read_lines(folder / ROLLOUTS), read_lines(folder / TRACE)
        segments = read_segments(folder)
        settings, no_settings = _settings(folder / SETTINGS)
    except OSError as error:
        raise PageError(f"{folder} cannot be read: {error.strerror or error}. Give the folder of a run") from error
    except ReportError as error:
        raise PageError(str(error)) from error
    if not has_file and not settings:
        raise PageError(f"{folder} has neither {METRICS} nor {SETTINGS} of a run. Give the train.output of a run")
    name = str(settings.get("name") or folder.resolve().name)
    run = RunRecord(
        folder=folder,
        name=name,
        label=name,
        settings=settings,
        lines=[lines[step] for step in sorted(lines)],
        accuracies=[],
        evaluations=[],
        groups=list(filter(is_group, groups)),
        traces=list(filter(is_trace, traces)),
        state_steps=steps_with_states(folder / STATES),
        segments=segments,
    )
    if no_settings:
        run.missing.append(f"{no_settings}.")
    for file, found, kept in ((ROLLOUTS, groups, run.groups), (TRACE, traces, run.traces)):
        if left_out := len(found) - len(kept):
            run.missing.append(f"{left_out} lines of {file} are not as a run writes them, and were left out.")
    _read_evaluations(run)
    _note_what_is_missing(run)
    return run


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where it is missing."""
    place: Any = settings
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _settings(file: Path) -> tuple[dict[str, Any], str]:
    if not file.exists():
        return {}, f"there is no {SETTINGS}, so its settings are unknown"
    try:
        found = json.loads(text_of(file))
        return (found, "") if is_run_settings(found) else ({}, f"{SETTINGS} is not the configuration of a run")
    except (ValueError, RecursionError) as error:
        return {}, f"{SETTINGS} cannot be read ({error})"


def _read_evaluations(run: RunRecord) -> None:
    """Read the evaluations; a damaged one is left out and noted."""
    run.evaluations += read_evaluations(run.folder / EVALUATIONS)
    unread = len(list((run.folder / EVALUATIONS).glob(f"{STEP_NAMES}.json"))) - len(run.evaluations)
    if unread:
        run.missing.append(f"{unread} of its evaluations cannot be read, or are of an older version.")
    for each in run.evaluations:
        shares: dict[str, list[float]] = {}
        for problem, share in each.correct.items():
            shares.setdefault(problem.rpartition("/")[0], []).append(share)
        run.accuracies += [Accuracy(each.step, source, tuple(shares[source])) for source in sorted(shares)]


def _note_what_is_missing(run: RunRecord) -> None:
    done, wanted = len(run.lines), run.wanted_steps
    last = run.lines[-1]["step"] + 1 if run.lines else 0
    note = run.missing.append
    if not done:
        note("no step is done yet, so it has no curves.")
    elif wanted and last < wanted:
        note(f"{last} of {wanted} steps are done: it still runs, or was ended.")
    if done == 1:
        note("one step is a point, not a curve.")
    raw = run.folder / METRICS
    if raw.exists() and (text := raw.read_bytes()) and not text.endswith(b"\n"):
        note(f"the last line of {METRICS} is cut short and was left out; it is being written, or was lost.")
    if not run.accuracies:
        note("nothing was evaluated (data.eval is empty, or no evaluation is due yet).")
    if done and not run.has_clipo:
        note("it ran without CLIPO, so it has no contrastive loss, bonus, cosines or embeddings.")
    if done and not run.state_steps:
        note("no states were kept (report.save_states = 0, or an older version), so there are no maps.")
    elif len(run.state_steps) == 1 and done > 1:
        note("states of one step only were kept so far, so there is no before and after.")
    if done and not run.groups:
        note("no texts were kept (report.save_rollouts = 0), so no pairs are shown.")
    if done and not run.traces:
        note("no step was traced (report.trace_every = 0, or an older version), so there is no timeline.")
