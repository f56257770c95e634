"""Whole runs: dynamic sampling, alarms, losses that are not finite, and what a run prints."""

import json

import pytest
from small_runs import SmallRun, checkpoint_state, metrics


@pytest.mark.full
def test_dynamic_sampling_with_a_correction_in_a_whole_run(small_config, tmp_path):
    output = tmp_path / "run"
    asked = ("rollout.max_refill_rounds=2", "rollout.over_sampling=1.5", "layout.dp=2", "train.steps=2", "data.eval=[]")
    asked += ("clipo.warmup_steps=0",)
    corrected = ("algorithm.correction.kind=mask", "algorithm.correction.level=geometric")
    SmallRun(small_config, output, *asked, *corrected).wait()
    lines = metrics(output)
    assert len(lines) == 2
    for line in lines:
        assert line["rollout/rounds"] == 1 + (line["rollout/refilled_groups"] > 0) or line["rollout/rounds"] == 3
        assert line["rollout/dropped_prompts"] + line["rollout/discarded_groups"] > 0
        assert line["reward/mixed_groups"] >= line["rollout/mixed_groups"] > 0
        assert (line["rollout/stale"], line["rollout/mixed_versions"], line["rollout/version_lag"]) == (0, 0, 0)
        assert abs(line["off_policy/importance_mean"] - 1) < 1e-3
        assert line["off_policy/mult_prob_error"] == line["policy/mult_prob_error"]


def test_an_alarm_stops_the_run_before_the_checkpoint(small_config, tmp_path):
    output = tmp_path / "run"
    limit = ("report.alarm_stops=true", "report.mult_prob_error_alarm=1.0e-9", "checkpoint.every=1", "data.eval=[]")
    run = SmallRun(small_config, output, *limit).wait(2)
    said = " ".join(run.said.split())
    assert "step 0: policy/mult_prob_error is 1" in said and "report.mult_prob_error_alarm = 1e-09" in said
    assert "before this step is saved" in said
    assert len(metrics(output)) == 1 and not (output / "checkpoints").exists()
    warned = SmallRun(small_config, output, *limit[1:], "report.alarm_stops=false", "train.steps=3").wait().said
    assert warned.count("warning: step") == 3 and (output / "checkpoints" / "step_000003").is_dir()


OVERFLOW = """
from clipo_megatron.algorithms.hook import Hook

class Overflow(Hook):
    summary = "rewards of more than a float32 holds"

    def shape_reward(self, table, reward):
        return reward * 1e38 * 1e38
"""


def test_losses_that_are_not_finite_skip_updates_and_end_the_run(small_config, tmp_path):
    output, plugin = tmp_path / "run", tmp_path / "overflow.py"
    plugin.write_text(OVERFLOW)
    odd = (f"algorithm.plugins=[{{name: '{plugin}:Overflow'}}]", "algorithm.mini_batches=1")
    quick = ("checkpoint.every=1", "data.eval=[]", "clipo.enabled=false", "algorithm.kl.coefficient=0")
    run = SmallRun(small_config, output, *odd, *quick, "optimizer.max_skipped_updates=1").wait(2)
    said = " ".join(run.said.split())
    assert "warning: step 0: loss or gradient of the policy was not finite; 1 of its updates skipped" in said
    assert (
        "step 1: the last 2 updates were skipped because loss or gradient was not finite (optimizer.max_skipped_updates"
        in said
    )
    first, second = metrics(output)
    assert [first["policy/skipped_in_a_row"], second["policy/skipped_in_a_row"]] == [1.0, 2.0]
    assert first["policy/loss"] is None and second["policy/update_skipped"] == 1.0
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000001"]  # and none of step 2
    state = checkpoint_state(output, 1)
    moments = [tensor for name, tensor in state.items() if name.startswith("policy.optimizer.exp_avg")]
    assert moments and not any(moment.any() for moment in moments)


def test_a_run_prints_no_output_of_libraries(undisturbed):
    (log,) = undisturbed.parent.glob("undisturbed.*.log")
    assert "Warning" not in log.read_text()
    assert json.loads((undisturbed / "config.json").read_text())["train"]["seed"] == 0
