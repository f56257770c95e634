"""Train-inference mismatch: which metrics cover rollouts of the current weights, and which cover all rollouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_steps import configuration, scored_groups
from ranks import RankPool
from tiny_models import tiny_llama

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import CorrectionConfig, CorrectionKind, CorrectionLevel, LayoutConfig
from clipo_megatron.flow import RolloutTable
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.telemetry.metrics import table_metrics

STEP = 5
# (sample, version of its first token, of its last): the others are fresh
STALE = {(0, 3, 3), (1, 4, STEP), (2, 2, 4)}


def score(folder: Path, layout_config: LayoutConfig, stale: bool | None) -> dict[str, Any]:
    """On a rank: metrics of made-up rollouts, and on the last stage each rollout's log-prob differences by row.

    `stale`: whether some of the rollouts are of older weights; None: all of them are.
    """
    config = configuration(folder)
    config.layout = layout_config
    config.algorithm.correction = CorrectionConfig(CorrectionKind.mask, CorrectionLevel.geometric, 1.5, 0.001)
    layout = parallel.initialize(config.layout, seed=0)
    algorithm = build_algorithm(config)
    actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=10)
    groups = scored_groups(STEP, vocab=actor.spec.vocab_size)[layout.rank :: layout.world]
    for group in groups:
        for rollout in group.group.rollouts:
            for sample, first, last in STALE if stale else ():
                if rollout.sample == sample and group.group.position % 2:
                    rollout.versions[:] = first
                    rollout.versions[-1] = last if len(rollout.versions) > 1 else first
            if stale is None:
                rollout.versions[:] = STEP - 1
    table, samples = build_table(groups, step=STEP)
    batches = actor.batcher.mini_batches_of(samples, table)
    micros = [micro for batch in batches for micro in batch.micro_batches]
    metrics = actor.score(micros, table, algorithm)
    gaps = {}
    if layout.is_last_stage:
        for micro in micros:
            for index, row in enumerate(micro.rows.tolist()):
                mine = micro.rollout == index
                gaps[row] = (micro.old_logprobs[mine].double() - micro.rollout_logprobs[mine].double()).tolist()
    return {"metrics": metrics, "gaps": gaps, "table": table}


def by_hand(gaps: dict[int, list[float]], table: RolloutTable) -> dict[str, float]:
    everything = [gap for row in sorted(gaps) for gap in gaps[row]]
    fresh = [gap for row in sorted(gaps) if table.version[row] == STEP for gap in gaps[row]]
    weights = [math.exp(sum(gap) / len(gap)) for gap in gaps.values() for _ in gap]
    acting = [weight if 0.001 <= weight <= 1.5 else 0.0 for weight in weights]
    count = len(everything)
    facts = {
        "off_policy/mult_prob_error": sum(math.exp(abs(gap)) for gap in everything) / count,
        "off_policy/rollout_kl": sum(math.exp(gap) - 1 - gap for gap in everything) / count,
        "off_policy/importance_mean": sum(acting) / count,
        "off_policy/above_cap": sum(weight > 1.5 for weight in weights) / count,
        "off_policy/below_floor": sum(weight < 0.001 for weight in weights) / count,
        "off_policy/effective_samples": sum(acting) ** 2 / (count * sum(weight**2 for weight in acting)),
    }
    if fresh:
        facts["policy/mult_prob_error"] = sum(math.exp(abs(gap)) for gap in fresh) / len(fresh)
        facts["policy/rollout_kl"] = -sum(fresh) / len(fresh)
    return facts


LAYOUTS = {"one rank": (1, LayoutConfig()), "PP2 x DP2": (4, LayoutConfig(pp=2))}


@pytest.mark.parametrize("stale", [True, False, None], ids=["some are stale", "all are fresh", "all are stale"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_metrics_that_alarms_watch_cover_fresh_rollouts_only(
    ranks: RankPool, tmp_path: Path, name: str, stale: bool | None
) -> None:
    results = ranks.run(score, LAYOUTS[name][0], tiny_llama(tmp_path, layers=2), LAYOUTS[name][1], stale)
    table = results[0]["table"]
    gaps = {row: gap for result in results for row, gap in result["gaps"].items()}
    assert len(gaps) == table.size
    expected = by_hand(gaps, table)
    for result in results:
        assert result["metrics"] == pytest.approx(expected, rel=1e-6)
    shares = table_metrics(table, torch.zeros(table.size), torch.zeros(table.size))
    if stale:
        assert expected["policy/mult_prob_error"] != pytest.approx(expected["off_policy/mult_prob_error"], rel=1e-2)
        assert 0 < shares["rollout/mixed_versions"] < shares["rollout/stale"] < 0.5
        rows = table.version != STEP
        assert shares["rollout/version_lag"] == pytest.approx(float((STEP - table.version[rows]).sum()) / table.size)
    else:
        assert ("policy/mult_prob_error" in expected) == (stale is False)
        assert shares["rollout/stale"] == shares["rollout/version_lag"] == (0.0 if stale is False else 1.0)
        assert shares["rollout/mixed_versions"] == 0
