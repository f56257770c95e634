"""Sessions of a run that differ from the session before them: which steps were trained with which settings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from clipo_megatron.config.errors import spell
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.parts import swatch, table
from clipo_megatron.report.reading import RunRecord
from clipo_megatron.report.scales import safe
from clipo_megatron.telemetry.segments import changes, remarks


def changed_settings(groups: Sequence[RunGroup]) -> str:
    """A card with the settings that runs changed on the way; empty if none did."""
    rows = [
        [swatch(group, run.label), safe(steps), "<br>".join(safe(each) for each in changed)]
        for group in groups
        for run in group.runs
        for steps, changed in sessions_of(run)
    ]
    if not rows:
        return ""
    caption = (
        '<p class="caption">These runs were resumed with other settings. The settings listed elsewhere are those of '
        "their last session. Steps are numbered as in metrics.jsonl.</p>"
    )
    shown = table(["run", "steps", "what changed"], rows, whole=(1,))
    return f'<div class="card below"><h3>Changed on the way</h3>{shown}{caption}</div>'


def sessions_of(run: RunRecord) -> list[tuple[str, list[str]]]:
    """The steps of each stretch of sessions that are alike, and what is new in it; [] if all sessions are alike."""
    starts, news = [0], [["as at the beginning"]]
    for before, segment in pairwise(run.segments):
        changed = [
            f"{each.key}: {spell(each.before)} \N{RIGHTWARDS ARROW} {spell(each.now)}"
            for each in changes(before, segment.settings)
        ]
        changed += remarks(before.fingerprints, segment.fingerprints)
        if changed:
            starts.append(segment.step)
            news.append(changed)
    if len(starts) == 1:
        return []
    ends = [f"{start - 1}" for start in starts[1:]]
    spans = [f"{start} to {end}" for start, end in zip(starts, [*ends, "the last"], strict=True)]
    return list(zip(spans, news, strict=True))
