"""A run that goes on without learning says so, and the end of a run names what is there and what comes next."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipo_megatron.config.schema import RunConfig, SourceConfig
from clipo_megatron.flow import StepReport
from clipo_megatron.telemetry.reporter import Reporter
from clipo_megatron.telemetry.standstill import STREAK, Standstill

LEARNING = {
    "reward/accuracy": 0.4,
    "clipo/bonus_at_floor": 0.1,
    "clipo/bonus_spread": 0.05,
    "clipo/positive_cosine": 0.9,
    "clipo/negative_cosine": 0.3,
}


def said(*steps: dict[str, float], config: RunConfig | None = None) -> list[list[str]]:
    """What is printed after each step."""
    watch = Standstill(config or RunConfig())
    return [watch.warnings(step, LEARNING | metrics) for step, metrics in enumerate(steps)]


def test_a_run_that_learns_says_nothing():
    assert said(*[{}] * 50) == [[]] * 50


@pytest.mark.parametrize(
    ("metrics", "sign", "remedy"),
    [
        ({"reward/accuracy": 0.0}, "no answer was correct, so nothing is learned", "rollouts.jsonl"),
        ({"reward/accuracy": 1.0}, "every answer was correct, so nothing is learned", "harder problems"),
        ({"clipo/bonus_at_floor": 1.0}, "clipo.floor", "clipo.calibrate=true"),
        ({"clipo/bonus_at_floor": 1.0, "clipo/bonus_spread": 0.0}, "the head is saturated", "clipo.calibrate=true"),
        ({"clipo/bonus_spread": 1e-5}, "same bonus", "clipo.temperature"),
        ({"clipo/positive_cosine": 0.9999, "clipo/negative_cosine": 0.9999}, "sees no difference", "clipo.debias=mean"),
    ],
)
def test_what_stops_learning_is_said_once_it_lasts(metrics, sign, remedy):
    found = said(*[metrics] * (4 * STREAK + 1))
    spoken = [step for step, lines in enumerate(found) if lines]
    assert spoken == [STREAK - 1, 2 * STREAK - 1, 4 * STREAK - 1], "after some steps, and at each doubling"
    (line,) = found[STREAK - 1]
    assert line.startswith(f"warning: for {STREAK} steps ") and sign in line and remedy in line


def test_one_better_step_begins_the_count_anew():
    none = {"reward/accuracy": 0.0}
    assert not any(said(*[none] * (STREAK - 1), {}, *[none] * (STREAK - 1)))


def test_a_step_without_the_metric_is_no_sign():
    watch = Standstill(RunConfig())
    assert not any(watch.warnings(step, {}) for step in range(20))


def test_the_head_is_not_judged_before_it_pays():
    config = RunConfig()
    config.clipo.warmup_steps = 10
    found = said(*[{"clipo/bonus_spread": 0.0}] * (10 + STREAK), config=config)
    assert [step for step, lines in enumerate(found) if lines] == [10 + STREAK - 1]
    config.clipo.warmup_steps, config.clipo.weight = 0, 0.0  # the head trains without a bonus, as asked
    assert not any(said(*[{"clipo/bonus_spread": 0.0}] * 20, config=config))


# ---------------------------------------------------------------- the end of a run


def closing(output: Path, capsys, *, checkpoint: bool, evaluated: bool, data: bool = True) -> str:
    config = RunConfig()
    config.train.output, config.train.steps = str(output), 3
    config.data.eval = [SourceConfig(path="exam.jsonl")] if data else []
    output.mkdir(parents=True, exist_ok=True)
    for made, name in ((checkpoint, "checkpoints/step_000003"), (evaluated, "eval")):
        if made:
            (output / name).mkdir(parents=True)
    (output / "metrics.jsonl").touch()
    Reporter(config, is_main=True).close(3)
    return capsys.readouterr().out


def test_the_end_of_a_run_names_only_what_is_there(tmp_path, capsys):
    said = closing(tmp_path / "run", capsys, checkpoint=False, evaluated=False)
    paths = [word for line in said.splitlines() for word in line.split() if word.startswith(str(tmp_path))]
    assert all(Path(path).exists() for path in paths if not path.endswith("report.html")), said
    assert "evaluation" not in said and "checkpoints" not in said and "metrics" in said
    said = closing(tmp_path / "whole", capsys, checkpoint=True, evaluated=True)
    assert f"evaluation   {tmp_path / 'whole' / 'eval'}" in said and "checkpoints" in said


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A virtual environment with `clipo` in the current folder, which PATH does not have."""
    program = tmp_path / "env" / "bin" / "clipo"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return program.parent


def test_the_end_of_a_run_calls_clipo_as_the_shell_finds_it(environment, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    assert f"  env/bin/clipo report {output} -o" in closing(output, capsys, checkpoint=False, evaluated=False)
    monkeypatch.setenv("PATH", str(environment))
    output = tmp_path / "again"
    assert f"  clipo report {output} -o" in closing(output, capsys, checkpoint=False, evaluated=False)


def test_the_end_of_a_run_says_what_comes_next(environment, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(environment))
    output = tmp_path / "my run"
    said = closing(output, capsys, checkpoint=True, evaluated=True)
    assert f"  clipo report '{output}' -o '{output}/report.html'\n" in said
    assert f"  clipo eval '{output}'\n" in said and f"  clipo convert to-hf '{output}' OUT\n" in said
    said = closing(tmp_path / "b", capsys, checkpoint=False, evaluated=False)
    assert "clipo report" in said and "clipo eval" not in said, "there is nothing to evaluate"
    said = closing(tmp_path / "c", capsys, checkpoint=True, evaluated=False, data=False)
    assert "'data.eval=[{path: test.parquet}]'" in said


def test_a_step_prints_the_warning(tmp_path, capsys):
    config = RunConfig()
    config.train.output = str(tmp_path)
    reporter = Reporter(config, is_main=True)
    for step in range(STREAK):
        reporter.step(StepReport(step, {"reward/accuracy": 0.0, "policy/update_skipped": 0.0}))
    assert f"warning: for {STREAK} steps no answer was correct" in capsys.readouterr().out
