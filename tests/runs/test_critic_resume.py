"""A run with a critic that goes on from a checkpoint: to the bit in its own layout, and in another one."""

import pytest
import torch
from small_runs import (
    EVERY,
    STEPS,
    SmallRun,
    assert_nearly_same_metrics,
    assert_same_run,
    checkpoint_state,
    halfway,
    metrics,
)

PPO = (
    "algorithm.name=ppo",
    "critic.learning_rate=1e-3",
    "critic.warmup_steps=1",
    "eval.every=0",
    "eval.at_start=false",
)


@pytest.mark.full
def test_resumed_in_its_layout_and_in_another(small_config, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    SmallRun(small_config, undisturbed, "layout.pp=2", *PPO).wait()
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(line["critic/grad_norm"] > 0 for line in lines)
    assert ["policy/grad_norm" in line for line in lines] == [False] + [True] * (STEPS - 1)
    before, after = (checkpoint_state(undisturbed, step) for step in (EVERY, STEPS))
    for name in ("critic.value_head.weight", "critic.optimizer.exp_avg_sq.value_head.weight"):
        assert name in after and not torch.equal(before[name], after[name]), name
    assert not any("output_layer" in name for name in after if name.startswith("critic."))
    for name, layout in (("same", "layout.pp=2"), ("other", "layout.tp=2")):
        run = SmallRun(small_config, halfway(undisturbed, tmp_path / name), layout, *PPO).wait()
        assert f"{EVERY} steps done" in run.said
    assert_same_run(tmp_path / "same", undisturbed)
    names = ("critic/loss", "critic/explained_variance", "critic/value_mean", "policy/loss", "reward/mean")
    assert_nearly_same_metrics(tmp_path / "other", undisturbed, names)
