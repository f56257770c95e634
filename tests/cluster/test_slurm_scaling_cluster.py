"""`clipo scale` on four nodes of a real Slurm: submitted, waited for, measured, and continued."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing

from clipo_megatron.telemetry.sinks import read_lines

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="cl") as short, Cluster(Path(short) / "s") as running:
        yield running


def test_a_study_runs_is_measured_and_not_run_twice(cluster, small_config, tmp_path):
    """One point, of two nodes, for the sake of time: what several are compared by is tested on their metrics."""
    arguments = [str(small_config), f"train.output={tmp_path}/out", "clipo.dim=16", "--nodes", "2", "--steps", "2"]
    arguments += ["--cpus-per-rank", "1"]

    def scale(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "clipo_megatron.cli", "scale", *arguments, *more],
            cwd=tmp_path,
            env={**cluster.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )

    queued = scale("--wait", "0")
    assert queued.returncode == 1 and "--wait is over: nodes-2 (job 1) not done" in queued.stdout, queued.stderr
    assert "nodes-2: not measured, 0 of 2 steps are done" in queued.stdout
    done = scale("--wait", "1")
    folder = tmp_path / "out" / "scale"
    logs = "".join(path.read_text()[-3000:] for path in sorted(folder.rglob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    (run,) = json.loads((folder / "scale.json").read_text())["runs"]
    assert (run["point"]["ranks"], run["point"]["prompts"], run["point"]["job"], run["steps"]) == (2, 4, "1", 1)
    output = Path(run["point"]["output"])
    (second,) = read_lines(output / "metrics.jsonl")[1:]
    assert run["tokens_per_s"] == pytest.approx(second["speed/tokens_per_s_per_rank"]) and run["tokens_per_s"] > 0
    assert [path.name for path in output.glob("jobs/*")] == ["001"], "the job in the queue was waited for"
    assert (output / "jobs" / "001" / "logs" / "rank1.log").exists() and not (output / "checkpoints").exists()
