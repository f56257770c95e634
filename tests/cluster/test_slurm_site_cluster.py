"""What a job that is submitted with defaults gets from a real Slurm, and what is refused before it queues."""

from __future__ import annotations

import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing
from slurm_runs import SlurmRun, clipo

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
OPTIONS = (
    "train.steps=2",
    "clipo.warmup_steps=0",
    "checkpoint.every=0",
    "eval.every=0",
    "eval.at_start=false",
    "report.console=false",
)
CORES, MEMORY_MB = 4, 6000  # of each node of the tests' cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="cl") as short, Cluster(Path(short) / "s", kill_wait_s=5) as started:
        yield started


def facts(cluster: Cluster, *what: str) -> str:
    return cluster.run("scontrol", "--oneliner", "show", *what)


def allocated(run: SlurmRun) -> None:
    """Wait for the job's nodes: of a job that waits, Slurm tells only what it needs at least."""
    run.wait_for(lambda: "JobState=PENDING" not in facts(run.cluster, "job", run.job), "the nodes of the job")


def test_a_job_with_defaults_gets_all_cores_and_all_memory_of_its_nodes(cluster, small_config, tmp_path):
    """And a relative --python is that of the submitting folder."""
    output = tmp_path / "run"
    elsewhere = tmp_path / "run.elsewhere"
    elsewhere.mkdir()
    (elsewhere / "venv").symlink_to(sys.prefix)
    run = SlurmRun(
        cluster, small_config, output, "--nodes", "2", "--python", "venv/bin/python", *OPTIONS, defaults=True
    )
    allocated(run)
    asked = facts(cluster, "job", run.job)
    assert re.search(rf"\bNumCPUs={2 * CORES}\b", asked), asked
    run.end()
    told = facts(cluster, "job", run.job)
    got = re.search(r"\b(?:AllocTRES|TRES)=cpu=(\d+),mem=([0-9.]+)([MG]),node=2", told)
    assert got, told
    memory = float(got[2]) * (1024 if got[3] == "G" else 1)
    assert int(got[1]) == 2 * CORES and memory == pytest.approx(2 * MEMORY_MB, rel=0.02), told
    assert f"1 ranks a node with {CORES} cores each" in run.log
    assert f"OMP_NUM_THREADS={CORES}" in (run.folder / "environment.0.txt").read_text()
    assert f"{elsewhere}/venv/bin/python" in (run.folder / "job.sbatch").read_text()
    assert run.outcomes() == ["started", "done"], run.story


def test_servers_beside_the_ranks_get_the_cores_and_memory_of_their_node(cluster, small_config, tmp_path):
    """An engine that only waits stands for a real one: what matters is the step that `clipo serve` runs in."""
    engine = tmp_path / "engine"
    engine.write_text("#!/bin/sh\nexec sleep 600\n")
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    served = ("rollout.engine=sglang", "layout.distributed_timeout_s=2700", "serve.python=../engine")
    run = SlurmRun(cluster, small_config, tmp_path / "run", "--nodes=1", *served, *OPTIONS, defaults=True)
    run.wait_for(lambda: bool(run.steps("servers")) and bool(run.steps("ranks")), "both steps")
    (servers,), (ranks,) = run.steps("servers"), run.steps("ranks")
    for step in (servers, ranks):
        told = facts(cluster, "step", step)
        assert "State=RUNNING" in told and re.search(rf"\bCPUs={CORES}\b", told), told
        assert not (limit := re.search(r"\bmem=(\d+)M", told)) or int(limit[1]) == MEMORY_MB, told
    assert f"{CORES} cores for a node's servers" in run.log
    cluster.run("scancel", run.job)
    run.end("CANCELLED")


def test_each_group_of_nodes_gets_its_own_nodes_whole(cluster, small_config, tmp_path):
    served = ("rollout.engine=sglang", "layout.distributed_timeout_s=2700", f"serve.python={sys.executable}")
    groups = ("--nodes=2", "--server-nodes=1", "--partition=debug", "--server-partition=debug")
    run = SlurmRun(cluster, small_config, tmp_path / "run", *groups, *served, *OPTIONS, defaults=True)
    allocated(run)
    told = cluster.run("squeue", "--noheader", "--format", "%i %D %C", "--jobs", run.job)
    assert sorted(line.split()[1:] for line in told.splitlines()) == [["1", str(CORES)], ["2", str(2 * CORES)]], told
    cluster.run("scancel", run.job)
    run.end("CANCELLED")


def test_steps_run_within_apptainer(cluster, small_config, tmp_path, monkeypatch):
    """A program in the place of Apptainer runs the command that it is given, and notes it."""
    programs, calls, image = tmp_path / "bin", tmp_path / "calls", tmp_path / "image.sif"
    programs.mkdir()
    image.touch()
    for name, text in {
        "apptainer": f'echo "$SLURMD_NODENAME $1 $2 $3" >> {calls}\nshift 3\nexec "$@"',
        "python3": f'exec {sys.executable} "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setitem(cluster.environment, "PATH", f"{programs}:{cluster.environment['PATH']}")
    run = SlurmRun(cluster, small_config, tmp_path / "run", "--nodes=2", f"--container={image}", *OPTIONS)
    run.end()
    assert run.outcomes() == ["started", "done"], run.story
    noted = calls.read_text()
    assert len(noted.splitlines()) == 4 and len({line.split()[0] for line in noted.splitlines()}) == 2, noted
    assert all(" exec --bind=" in line and line.endswith(f" {image}") for line in noted.splitlines())


def test_a_broken_plug_in_is_refused_before_the_job_queues(cluster, small_config, tmp_path):
    (tmp_path / "broken.py").write_text("class Broken(:\n")
    plugin = "algorithm.plugins=[{name: broken.py:Broken}]"
    output = tmp_path / "run"
    said = clipo(cluster, tmp_path, "submit", str(small_config), f"train.output={output}", plugin, "--nodes=1", code=2)
    assert "broken.py" in said and "SyntaxError" in said
    assert cluster.run("squeue", "--noheader") == "" and not output.exists()
