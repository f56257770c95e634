"""A run that an older version began resumes with equal metrics, and can be evaluated and reported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from small_runs import SmallRun, metrics

from clipo_megatron.telemetry.segments import read_segments

OLDER_RUN = Path(__file__).parents[1] / "fixtures" / "older_run"
RENAMED = (
    ("faults.frozen_s", "faults.heartbeat_timeout_s"),
    ("faults.stuck_s", "faults.phase_timeout_s"),
    ("faults.stop_s", "faults.grace_period_s"),
    ("rollout.refill_rounds", "rollout.max_refill_rounds"),
)


@pytest.fixture
def older(tmp_path):
    """A copy of the older run's folder."""
    return shutil.copytree(OLDER_RUN, tmp_path / "older")


def in_place(folder: Path) -> list[str]:
    """Overrides of the settings that are paths relative to the folder."""
    data = (
        f"data.{use}=[{{path: {folder / name}}}]" for use, name in (("train", "practice.jsonl"), ("eval", "exam.jsonl"))
    )
    return [f"model.path={folder / 'model'}", *data]


# Relative; others are 1e-6. In fp32, ways of adding the same terms in attention, each exact to 1e-12 in float64, differ
# by 1e-6 to 4e-6 of the gradients, and updates go as much further from the start: the older version does with prompts
# apart, or with torch's plain kernel.
TOLERANCES = {"policy/grad_norm": 1e-5, "policy/reference_kl": 1e-5}


def test_an_older_run_resumes_with_equal_metrics(older, monkeypatch):
    """Given its choice in step 3, where D3S had 21 equal ones and the last bit of a sum decided (`older_choices`)."""
    monkeypatch.setenv(warm.IMPORT, "older_choices")
    run = SmallRun(older / "run.yaml", older / "run", *in_place(older)).wait()
    assert "step_000002, 2 steps done" in run.said
    for old, new in RENAMED:
        assert any(old in line and new in line for line in run.said.splitlines()), f"nothing names {new}"
    resumed, before = metrics(older / "run"), metrics(OLDER_RUN / "run")
    assert [line["step"] for line in resumed] == [0, 1, 2, 3]
    assert before[2]["clipo/bonus_mean"] and before[2]["policy/grad_norm"] and before[2]["critic/loss"]
    for mine, theirs in zip(resumed, before, strict=True):
        if mine["step"] >= 2:  # versions before wrote 1 here whatever the groups were
            theirs["rollout/mixed_groups"] = theirs["reward/mixed_groups"]
        for name, tolerance in TOLERANCES.items():
            assert mine.pop(name) == pytest.approx(theirs.pop(name), rel=tolerance)
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert [each.step for each in read_segments(older / "run")] == [2]
    assert "model.path  " in run.said and "optimizer.learning_rate" not in run.said, "only paths have changed"
    evaluated, before = (
        json.loads((folder / "run" / "eval" / "step_000004.json").read_text()) for folder in (older, OLDER_RUN)
    )
    assert evaluated["problems"] == before["problems"]


def test_an_older_checkpoint_is_evaluated(older):
    run, file = older / "run", older / "now.json"
    SmallRun(run / "checkpoints" / "step_000002", run, "--output", str(file), *in_place(older), command="eval").wait()
    now, before = (json.loads(each.read_text()) for each in (file, run / "eval" / "step_000002.json"))
    assert now["problems"] == before["problems"] and now["settings"] == before["settings"]


def test_an_older_run_is_reported(older):
    page = older / "page.html"
    command = [sys.executable, "-m", "clipo_megatron.cli", "report", str(older / "run"), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "before" in text and "Held-out accuracy" in text and "Representation" in text
