"""Runs on a real Slurm cluster of four nodes on this machine: interrupted, and equal to the bit to others."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing
from slurm_runs import SlurmRun
from small_runs import SmallRun, assert_same_run, metrics

from clipo_megatron.config.model_folder import is_checkpoint

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
STEPS = 12
OPTIONS = (f"train.steps={STEPS}", "checkpoint.every=2", "eval.every=0", "report.console=false")
# Runs that everything happens to, at moments drawn at random; a minute each, so none in a common run of the tests.
ROUNDS = int(os.environ.get("CLIPO_CLUSTER_ROUNDS", "0"))


@pytest.fixture(scope="module")
def unshared(tmp_path_factory) -> Path:
    """A folder that the last node has another one in the place of."""
    return tmp_path_factory.mktemp("unshared")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, unshared):
    with Cluster(tmp_path_factory.mktemp("slurm"), kill_wait_s=5, unshared=(unshared, ["n4"])) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed_dp2(small_config) -> Path:
    output = small_config.with_name("undisturbed_dp2")
    SmallRun(small_config, output, "layout.dp=2", *OPTIONS).wait()
    return output


def test_asked_to_stop_then_cut_it_is_the_undisturbed_run(cluster, small_config, undisturbed_dp2, tmp_path):
    run = SlurmRun(cluster, small_config, tmp_path / "run", "--nodes", "2", *OPTIONS)
    run.wait_for_step(2)
    run.near_the_walltime()
    run.wait_for_step(6)
    run.cancel_the_ranks()
    run.end()
    assert_same_run(run.output, undisturbed_dp2, STEPS)
    assert run.outcomes() == ["started", "requeued", "started", "code-137", "done"], run.story
    assert sorted(path.name for path in (run.folder / "logs").iterdir()) == ["rank0.log", "rank1.log"]
    assert [line["step"] for line in metrics(run.output)] == list(range(STEPS))


if ROUNDS:

    @pytest.mark.parametrize("round_", range(ROUNDS))
    def test_everything_happens_at_random_moments(cluster, small_config, undisturbed_dp2, tmp_path, round_):
        """`scontrol requeue`, USR1, the step cancelled, the ranks of one node killed: in any order, at any moment."""
        seed = random.SystemRandom().randrange(2**32)
        draw = random.Random(seed)
        run = SlurmRun(cluster, small_config, tmp_path / "run", "--nodes", "2", *OPTIONS)
        events = [run.requeue, run.near_the_walltime, run.cancel_the_ranks, lambda: run.lose(draw.choice(("n1", "n2")))]
        draw.shuffle(events)
        moments = sorted(draw.sample(range(1, STEPS - 2), len(events)))
        print(f"seed {seed}: at steps {moments}")
        for moment, event in zip(moments, events, strict=True):
            run.wait_for_step(moment)
            time.sleep(draw.uniform(0.0, 0.5))
            if cluster.state(run.job) != "RUNNING":
                break  # it won the race
            event()
        run.end()
        print(run.outcomes())
        assert_same_run(run.output, undisturbed_dp2, STEPS)


def test_a_model_is_converted_and_evaluated(cluster, small_config, tmp_path):
    target = tmp_path / "megatron"
    convert = SlurmRun(
        cluster, small_config, tmp_path / "a", "--nodes=2", "--job=to-megatron", f"--target={target}", "layout.pp=2"
    )
    evaluate = SlurmRun(cluster, small_config, tmp_path / "b", "--nodes=2", "--job=eval", "report.console=false")
    for job in (convert, evaluate):
        job.end()
        assert job.outcomes() == ["started", "done"], job.story
        logs = ["rank0.log"] if job is convert else ["rank0.log", "rank1.log"]  # a conversion is one process
        assert sorted(path.name for path in (job.folder / "logs").iterdir()) == logs
    assert is_checkpoint(target) and f"done: {target}" in convert.log
    assert [path.name for path in (evaluate.output / "results").iterdir()] == ["step_000000.json"]


def test_a_node_without_the_shared_folder_is_named(cluster: Cluster, small_config: Path, unshared: Path):
    run = SlurmRun(cluster, small_config, unshared / "run", "--nodes", "2", "--sbatch=--nodelist=n3,n4")
    run.end("FAILED")
    assert "n4 does not see" in run.log and "not shared with this node" in run.log
    assert "these nodes cannot work for this job: n4. Put train.output" in run.log
    assert not list((run.folder / "logs").iterdir())
    assert len(run.outcomes()) == 0
