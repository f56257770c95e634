"""The segments of a run: each session that trained it, with its settings and what they stood for. Imports no torch.

segments.jsonl has one line a session:

    step           steps that were done when it began
    started        its time, UTC
    settings       the whole configuration
    fingerprints   of model, tokenizer, chat template and problems; see training/fingerprints.py

A session whose steps a later one repeats is dropped, as its metrics are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipo_megatron.config.differences import ChangedSetting, differences
from clipo_megatron.config.model_folder import is_run_settings, read_run_settings
from clipo_megatron.runtime.run_dir import SEGMENTS, SETTINGS
from clipo_megatron.telemetry.sinks import append, keep_before, read_lines

_START_OVER = "choose another train.output, or start over with checkpoint.resume=false"
# Settings that say nothing about how a step is trained: where a run is, and by which address it asks its servers.
_PLACES = ("train.output", "rollout.endpoints", "rollout.router", "rollout.sync.host")


@dataclass(frozen=True)
class RunSegment:
    """One session of a run."""

    step: int  # steps done when it began
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, Any] = field(default_factory=dict)  # {} for runs of before they were recorded
    started: str = ""


def read_segments(output: Path) -> list[RunSegment]:
    """The segments of a run, in order; [] for a run of before they were recorded."""
    return [
        RunSegment(line["step"], line["settings"], line.get("fingerprints") or {}, str(line.get("started", "")))
        for line in read_lines(output / SEGMENTS)
        if is_run_settings(line.get("settings"))
    ]


def segment_before(output: Path, step: int) -> RunSegment | None:
    """The session that made the step before `step`; None if nothing is known about it.

    Of a run of before segments were recorded its config.json is known, that of its last session.
    """
    found = read_segments(output)
    trained = [each for each in found if each.step < step]
    if found:
        return (trained or found)[-1]
    settings = read_run_settings(output / SETTINGS)
    return None if settings is None else RunSegment(0, settings)


def add_segment(output: Path, step: int, settings: Mapping[str, Any], fingerprints: Mapping[str, Any]) -> None:
    """Add the session that begins after `step` steps, in place of those that began there or later.

    Raises:
        ReportError: the file cannot be written.
    """
    file = output / SEGMENTS
    keep_before(file, step)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"step": step, "started": started, "settings": settings, "fingerprints": fingerprints}
    with file.open("a") as opened:
        append(opened, json.dumps(line, default=str) + "\n")


def changes(before: RunSegment, settings: Mapping[str, Any]) -> list[ChangedSetting]:
    """The settings that differ from those of a former session."""
    return differences(before.settings, settings, ignore=_PLACES)


def refusals(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences about what a run cannot go on with; [] where nothing of the kind has changed or is known."""
    found = []
    if _differ(before, now, "model", "digest"):
        path, other = now["model"]["path"], before["model"].get("path")
        where = f"model.path = {path}" if path == other else f"model.path = {path} (it was {other})"
        found.append(
            f"the weights at {where} are not those that this run was started from: its checkpoints and its reference "
            f"policy would be of two models. Restore the model, {_START_OVER}."
        )
    if _differ(before, now, "tokenizer"):
        found.append(
            "the tokenizer gives tokens other ids than the one that this run was started with, so that its weights "
            f"would read other words. Restore the tokenizer, {_START_OVER}."
        )
    return found


def remarks(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences about what has changed and does not keep a run from going on."""
    found = []
    if template := _differ(before, now, "template"):
        found.append("the chat template is another one than before: prompts are rendered differently from here on")
    for name, problems, effect in (
        ("train", "training", "the run goes on at its place among the new ones"),
        ("eval", "evaluation", "accuracies before and after are not those of the same problems"),
    ):
        if _differ(before, now, name, "questions"):
            count, other = now[name]["count"], before[name]["count"]
            how = f"they are {count} as before" if count == other else f"there are {count}, and were {other}"
            found.append(f"the {problems} problems are not those of before ({how}): {effect}")
        elif _differ(before, now, name, "problems") and not _differ(before, now, name, "tokens"):
            found.append(f"the {problems} problems ask what they asked before, and have other gold answers: {effect}")
        elif not template and _differ(before, now, name, "tokens"):
            found.append(
                f"the {problems} problems ask what they asked before, and are rendered or tokenized differently from "
                "here on (turns of the system, template options or tokenizer)"
            )
    return found


def _differ(before: Mapping[str, Any], now: Mapping[str, Any], *path: str) -> bool:
    """Whether both have a fact, and it differs."""
    first, second = before, now
    for name in path:
        first = first.get(name) if isinstance(first, Mapping) else None
        second = second.get(name) if isinstance(second, Mapping) else None
    return first is not None and second is not None and first != second
