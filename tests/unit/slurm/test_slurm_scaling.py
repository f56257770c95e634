"""`clipo scale` without a cluster: the points of a study, and what is computed from their metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import STEPS

from clipo_megatron.cli.main import main
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.slurm.measure import efficiency, measure
from clipo_megatron.slurm.resources import Resources, SlurmError
from clipo_megatron.slurm.scaling_points import STRONG, WEAK, ScalingPoint, continued, read, scaling_points, write

POINT = ScalingPoint("nodes-1", (WEAK, STRONG), 1, 0, 1, 0, STEPS, 4, "", ())


def eight_gpus(nodes: int, server_nodes: int) -> Resources:
    return Resources(nodes=nodes, server_nodes=server_nodes, gpus_per_node=8)


@pytest.fixture
def config() -> RunConfig:
    config = RunConfig()
    config.layout.tp, config.layout.pp, config.data.prompts_per_step = 4, 2, 32
    config.train.output = "runs/mine"
    return config


# ---------------------------------------------------------------- points


def test_replicas_grow_with_the_nodes_and_prompts_in_weak_scaling_only(config):
    points = scaling_points(config, [1, 2, 4], [], eight_gpus, kinds=(WEAK, STRONG), steps=5)
    assert [(point.name, point.prompts, point.gpus) for point in points] == [
        ("nodes-1", 32, 8),
        ("weak-2", 64, 16),
        ("strong-2", 32, 16),
        ("weak-4", 128, 32),
        ("strong-4", 32, 32),
    ]
    assert points[0].kinds == (WEAK, STRONG) and points[0].is_first and not points[1].is_first
    assert "layout.dp=4" in points[3].overrides and "data.prompts_per_step=128" in points[3].overrides
    assert all(
        Path(point.output).is_absolute() and point.output.endswith(f"runs/mine/scale/{point.name}") for point in points
    )


def test_overrides_of_a_rung_are_valid_settings(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: somewhere}\ndata: {eval: [{path: exam.jsonl}]}\nclipo: {warmup_steps: 50}\n")
    (point,) = scaling_points(config, [2], [1], eight_gpus, kinds=(WEAK,), steps=5)
    run = load(file, point.overrides)
    assert (run.name, run.train.steps, run.layout.dp, run.train.output) == ("run-nodes-2", 5, 2, point.output)
    assert run.data.eval == [] and run.clipo.warmup_steps == 0 and run.checkpoint.every == 0
    assert (point.server_nodes, point.gpus) == (1, 24)


@pytest.mark.parametrize(
    ("nodes", "servers", "message"),
    [
        ([], [], "--nodes : give different numbers in rising order"),
        ([2, 1], [], "--nodes 2,1: give different numbers"),
        ([1, 2], [1], "--server-nodes 1 has 1 numbers, and --nodes 1,2 has 2"),
        ([3, 4], [], "data.prompts_per_step = 32 on 3 nodes is no whole number on 4"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(nodes, servers, message, config):
    with pytest.raises(SlurmError, match=message):
        scaling_points(config, nodes, servers, eight_gpus, kinds=(WEAK,), steps=5)


def test_a_layout_that_does_not_divide_the_ranks_is_refused(config):
    config.layout.tp = 3
    with pytest.raises(SlurmError, match=r"1 nodes have 8 ranks, which layout\.tp x cp x pp = 6 does not divide"):
        scaling_points(config, [1, 2], [], eight_gpus, kinds=(WEAK,), steps=5)


def test_a_study_is_continued_and_never_mixed_with_another(config, tmp_path):
    points = scaling_points(config, [1, 2], [], eight_gpus, kinds=(WEAK,), steps=5)
    write(tmp_path, [replace(points[0], job="17"), points[1]])
    (tmp_path / "points.json").rename(tmp_path / "ladder.json")  # as earlier releases called it
    assert [point.job for point in continued(points, read(tmp_path))] == ["17", None]
    assert read(tmp_path / "nowhere") == []
    longer = scaling_points(config, [1, 2], [], eight_gpus, kinds=(WEAK,), steps=6)
    with pytest.raises(SlurmError, match="belongs to another study, of 32 prompts and 5 steps on 8 ranks"):
        continued(longer, read(tmp_path))
    (tmp_path / "points.json").write_text("[{}]")
    with pytest.raises(SlurmError, match="cannot be read"):
        read(tmp_path)


# ---------------------------------------------------------------- figures


def write_run(point: ScalingPoint, folder: Path, seconds: list[float], rate: float) -> ScalingPoint:
    """Metrics of a run that trains `rate` tokens per second per rank, half of the time in `update`."""
    point = replace(point, output=str(folder / point.name), steps=len(seconds))
    Path(point.output).mkdir(parents=True)
    lines = [
        {"step": n, "time/step_s": s, "time/update_s": s / 2, "speed/tokens_per_s_per_rank": rate}
        for n, s in enumerate(seconds)
    ]
    Path(point.output, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return point


@pytest.fixture
def measured_points(config, tmp_path) -> list[ScalingPoint]:
    """One rank per GPU, 2 nodes of 8: 100, 80 (weak), 60 (strong) tokens per second per GPU; the first step is slow."""
    points = scaling_points(config, [1, 2], [], eight_gpus, kinds=(WEAK, STRONG), steps=3)
    rates = {"nodes-1": 100.0, "weak-2": 80.0, "strong-2": 60.0}
    return [write_run(point, tmp_path / "scale", [50.0, 2.0, 4.0], rates[point.name]) for point in points]


def test_efficiency_compares_with_the_smallest_run(measured_points):
    runs = [measure(point, skip=1) for point in measured_points]
    assert [run.seconds for run in runs] == [3.0] * 3, "the first step does not count"
    assert [run.tokens_per_s for run in runs] == pytest.approx([100.0, 80.0, 60.0])
    assert efficiency(runs, WEAK) == pytest.approx({"nodes-1": 1.0, "weak-2": 0.8})
    assert efficiency(runs, STRONG) == pytest.approx({"nodes-1": 1.0, "strong-2": 0.6})
    assert efficiency(runs[1:], WEAK) == {}, "without the smallest there is nothing to compare with"
    assert runs[0].shares["update"] == runs[0].shares["other"] == pytest.approx(0.5)


def test_the_gpus_of_servers_count(config, tmp_path):
    """A rank's 100 tokens per second, on 8 GPUs that train and 8 that generate."""
    (point,) = scaling_points(config, [1], [1], eight_gpus, kinds=(WEAK,), steps=3)
    assert measure(write_run(point, tmp_path, [1.0, 1.0], 100.0), skip=1).tokens_per_s == pytest.approx(50.0)


# ---------------------------------------------------------------- the command


@pytest.fixture
def run_file(measured_points, tmp_path) -> str:
    write(tmp_path / "scale", measured_points)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: somewhere}}\ntrain: {{output: {tmp_path}}}\n")
    return str(file)


def test_measurements_are_printed_and_drawn(run_file, tmp_path, capsys):
    assert main(["scale", run_file, "--collect"]) == 0
    output = capsys.readouterr().out
    figures, shares = output.split("of the time:")
    rows = {line.split()[0]: line.split() for line in figures.splitlines() if "%" in line}
    assert rows["weak-2"] == ["weak-2", "2", "16", "64", "3", "2", "to", "4", "80", "80%"]
    assert rows["nodes-1"][-2:] == ["100%"] * 2 and rows["strong-2"][-1] == "60%"
    assert "nodes-1         0%        0%     0%     50%    0%    50%" in shares
    assert max(map(len, output.partition("  /")[0].splitlines())) <= 80
    table = (tmp_path / "scale" / "scale.md").read_text().splitlines()
    assert len(table) == 5 and table[4].startswith("| weak-2 | 2 | 16 | 64 |"), table
    figures = json.loads((tmp_path / "scale" / "scale.json").read_text())
    assert figures["efficiency"][WEAK]["weak-2"] == pytest.approx(0.8) and len(figures["runs"]) == 3
    picture = (tmp_path / "scale" / "scale.svg").read_bytes()
    assert b"<svg" in picture
    assert main(["scale", run_file, "--collect"]) == 0
    assert (tmp_path / "scale" / "scale.svg").read_bytes() == picture, "the same file for the same figures"


def test_an_unfinished_run_is_named(run_file, measured_points, capsys):
    file = Path(measured_points[1].output) / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    assert main(["scale", run_file, "--collect"]) == 1
    output = capsys.readouterr().out
    assert "weak-2: not measured, 2 of 3 steps are done" in output and "80%" not in output and "60%" in output


def test_other_settings_are_another_study(small_config, measured_points, run_file, tmp_path, capsys):
    """The study that is there was of other prompts, ranks and settings."""
    arguments = ["scale", str(small_config), f"train.output={tmp_path}", "--nodes", "1,2", "--dry-run"]
    assert main(arguments) == 2
    assert "belongs to another study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --nodes, such as --nodes 1,2,4,8, or --collect"),
        (["--nodes", "1,2", "--steps", "3", "--skip", "3"], "--skip 3 of --steps 3 leaves nothing to measure"),
        (["--collect", "train.output=elsewhere"], "has no scaling study"),
    ],
)
def test_impossible_requests_are_refused(arguments, message, run_file, capsys):
    assert main(["scale", run_file, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_checks_every_rung_and_writes_nothing(small_config, tmp_path, capsys):
    arguments = ["scale", str(small_config), f"train.output={tmp_path}/out", "--dry-run", "--ranks-per-node", "2"]
    assert main([*arguments, "--nodes", "1,2"]) == 0
    output = capsys.readouterr().out
    assert "nodes-1    2 ranks on 1 node, 4 prompts per step" in output
    assert "weak-2     4 ranks on 2 nodes, 8 prompts per step" in output
    assert "strong-2   4 ranks on 2 nodes, 4 prompts per step" in output and list(tmp_path.iterdir()) == []
    assert main([*arguments, "--nodes", "1,4", "--kind", "strong"]) == 2
    assert "there are 8 model replicas, and each needs at least one prompt" in capsys.readouterr().err
