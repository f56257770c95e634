"""Groups whose rollouts and tokens are of several versions: their ages are counted, and CLIPO's bonus is unmoved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from policy_steps import configuration, made_up_context, scored_groups
from ranks import RankPool
from tiny_models import tiny_llama

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.flow import ScoredGroup
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.training.ages import age_metrics

STEP, AHEAD = 2, 2


def age(groups: list[ScoredGroup]) -> None:
    """Let tokens be of older weights: of group 0 all, of the others those of some rollouts, or of their beginnings."""
    for scored in groups:
        for rollout in scored.group.rollouts:
            if scored.group.position == 0:
                rollout.versions[:] = STEP - 1
            elif rollout.sample % 2:
                rollout.versions[: rollout.sample + 1] = STEP - 2
                rollout.versions[rollout.sample + 1 : -1] = STEP - 1


def bonuses(folder: Path) -> dict[str, Any]:
    """On a rank: bonus and advantage of the same tokens at one version and at several, and the ages' metrics."""
    config = configuration(folder)
    config.layout, config.rollout.ahead = LayoutConfig(pp=2), AHEAD
    layout = parallel.initialize(config.layout, seed=0)
    found: dict[str, Any] = {}
    for name in ("one", "several"):
        algorithm = build_algorithm(config, made_up_context(config))
        actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=10)  # its head learns with each scoring
        everything = scored_groups(STEP, vocab=actor.spec.vocab_size)
        if name == "several":
            age(everything)
        groups = everything[layout.rank :: layout.world]
        table, samples = build_table(groups, step=STEP, observe=algorithm.observe)
        batches = actor.batcher.mini_batches_of(samples, table)
        scored = actor.score([micro for batch in batches for micro in batch.micro_batches], table, algorithm)
        experience = algorithm.assign_advantages(table, batches)
        ages = age_metrics(groups, step=STEP, bound=AHEAD)
        found[name] = {"bonus": experience.bonus, "advantage": experience.advantage, "ages": ages, "score": scored}
    found["groups"] = everything
    return found


def test_a_group_of_several_versions_has_the_bonus_of_its_tokens(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(bonuses, 2, tiny_llama(tmp_path, layers=2, vocab=263))
    for result in results:
        one, several = result["one"], result["several"]
        assert one["bonus"].count_nonzero() > 3
        assert several["bonus"].equal(one["bonus"]) and several["advantage"].equal(one["advantage"])
        assert one["ages"] == dict.fromkeys(one["ages"], 0.0) | {"off_policy/age_0": 1.0}
        assert "off_policy/effective_samples" in several["score"], "with steps ahead weights are truncated by default"

    counts: Counter[int] = Counter()
    spanning = 0
    for scored in results[0]["groups"]:
        ages = [STEP - int(version) for rollout in scored.group.rollouts for version in rollout.versions]
        counts.update(ages)
        spanning += len(set(ages)) > 1
    tokens = sum(counts.values())
    expected = {f"off_policy/age_{each}": counts[each] / tokens for each in range(AHEAD + 1)}
    expected["off_policy/age_mean"] = sum(each * count for each, count in counts.items()) / tokens
    expected |= {"off_policy/age_max": 2.0, "off_policy/spanning_groups": spanning / len(results[0]["groups"])}
    assert 0 < spanning < len(results[0]["groups"]) and min(counts[each] for each in range(3)) > 0
    for result in results:
        assert result["several"]["ages"] == pytest.approx(expected)
