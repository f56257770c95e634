"""Every kind of broken things, by name, and the sound folder that all of them start from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import broken_folders
import broken_runs
import broken_settings
from paths import SUPPORT

from clipo_megatron.config.load import load

OLDER_RUN = SUPPORT.parent / "fixtures" / "older_run"
KINDS = {
    "sound": broken_settings.sound,
    "settings": broken_settings.settings,
    "yaml": broken_settings.yaml_text,
    "overrides": broken_settings.overrides,
    "words": broken_settings.words,
    "environment": broken_settings.environment,
    "rows": broken_folders.rows,
    "model": broken_folders.model,
    "checkpoint": broken_folders.checkpoint,
    "run": broken_runs.run,
    "results": broken_runs.results,
    "targets": broken_runs.targets,
    "answers": broken_runs.answers,
}
NEW_NAMES = {
    "refill_rounds": "max_refill_rounds",
    "frozen_s": "heartbeat_timeout_s",
    "stuck_s": "phase_timeout_s",
    "stop_s": "grace_period_s",
}


def write_sound(folder: Path) -> None:
    """A folder of a user: run.yaml, a tiny model, problems, and a run of four steps with a checkpoint after two.

    Problems stand in practice.jsonl and exam.jsonl, and the latter's also in exam.parquet.
    """
    import pyarrow
    import pyarrow.parquet

    shutil.copytree(OLDER_RUN, folder)
    text = (folder / "run.yaml").read_text()
    for old, new in NEW_NAMES.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    if not all(each.stat().st_mode & 1 for each in Path(sys.executable).resolve().parents):
        # Whom the cases run as can read the interpreter by a power that the sandbox of graders takes.
        text = text.replace('"reward": {', '"reward": {"sandbox": "none", ')
    (folder / "run.yaml").write_text(text)
    rows = [json.loads(line) for line in (folder / "exam.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "exam.parquet")
    with contextlib.chdir(folder):
        settings = dataclasses.asdict(load("run.yaml"))
    (folder / "run" / "config.json").write_text(json.dumps(settings, default=str))
    line = {"step": 0, "started": "2026-01-01T00:00:00+00:00", "settings": settings, "fingerprints": {}}
    (folder / "run" / "segments.jsonl").write_text(json.dumps(line, default=str) + "\n")
