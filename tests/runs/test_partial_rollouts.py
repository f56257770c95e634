"""Whole runs whose rollouts grow in windows, on several layouts and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import (
    EVERY,
    STEPS,
    SmallRun,
    assert_nearly_same_metrics,
    assert_same_run,
    halfway,
    metrics,
    write_model,
)

WINDOW = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


T_PPO = (
    "algorithm.name=t_ppo",
    f"rollout.window_tokens={WINDOW}",
    "critic.learning_rate=1e-3",
    "eval.every=0",
    "eval.at_start=false",
)


@pytest.mark.full
def test_a_run_in_windows_on_any_layout_and_resumed(small_config, tmp_path) -> None:
    """Undisturbed on one rank, on TP2 x PP2, and resumed halfway: to the bit, and on the other layout nearly so."""
    undisturbed = tmp_path / "undisturbed"
    SmallRun(small_config, undisturbed, *T_PPO).wait()
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(0 < line["rollout/windows"] < 1 for line in lines) and all(
        line["reward/ungraded"] == 0 for line in lines
    )
    assert any(line.get("clipo/bonus_mean", 0.0) != 0 for line in lines), lines
    for name, layout in (("same", ()), ("other", ("layout.tp=2", "layout.pp=2"))):
        run = SmallRun(small_config, halfway(undisturbed, tmp_path / name), *layout, *T_PPO).wait()
        assert f"{EVERY} steps done" in run.said
    assert_same_run(tmp_path / "same", undisturbed)
    names = ("critic/loss", "critic/explained_variance", "policy/loss", "reward/mean", "rollout/windows")
    assert_nearly_same_metrics(tmp_path / "other", undisturbed, names)
