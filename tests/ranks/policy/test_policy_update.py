"""Gradients of the packed update against a plain transformers implementation, and updates that are skipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from policy_steps import configuration, scored_groups, train
from ranks import RankPool
from tiny_models import tiny_llama, tiny_mistral, tiny_phi3, tiny_qwen2, tiny_qwen3
from update_steps import VOCAB, one_update, plainly

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import Aggregation, DType, KLConfig, KLKind, LayoutConfig, RunConfig
from clipo_megatron.flow import ScoredGroup, Verdict
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table


@pytest.mark.parametrize(
    ("terms", "share"),
    [
        ("policy loss", False),
        ("kl, entropy and supports, by sequence", True),
        pytest.param("policy loss", True, marks=pytest.mark.full),
        pytest.param("kl, entropy and supports, by sequence", False, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize(
    ("family", "tied"),
    [(tiny_llama, True), (tiny_qwen2, False), (tiny_qwen3, True), (tiny_mistral, False), (tiny_phi3, True)],
)
def test_gradients_are_those_of_a_plain_implementation(
    family: Any, tied: bool, terms: str, share: bool, ranks: RankPool, tmp_path: Path
) -> None:
    config = configuration(family(tmp_path, tied=tied, vocab=VOCAB))
    if terms != "policy loss":
        config.algorithm.kl = KLConfig(coefficient=0.2, kind=KLKind.k3)
        config.algorithm.entropy_coefficient = 0.05
        config.algorithm.aggregation = Aggregation.sequence_mean
        config.algorithm.clip_low, config.algorithm.clip_high = 0.1, 0.25
        config.rollout.temperature, config.rollout.top_k = 0.8, 6
    ours = ranks.run(one_update, 1, config, LayoutConfig(share_prompts=share, max_tokens_per_microbatch=100))[0]
    assert ours["micro_batches"] > 1
    loss, gradients = plainly(config, ours["advantage"])
    assert ours["metrics"]["policy/loss"] == pytest.approx(loss, abs=1e-5)
    assert ours["gradients"].keys() - gradients.keys() == set()
    far = {}
    for name, expected in gradients.items():
        assert expected.abs().max() > 1e-6, name
        far[name] = float((ours["gradients"][name] - expected).abs().max() / expected.abs().max())
    assert max(far.values()) <= 1e-5, far
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))
    assert ours["metrics"]["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)


# --- updates that are skipped ------------------------------------------------------------------------------------


def broken_then_sound(config: RunConfig, layout_config: LayoutConfig, poison: float) -> list[Any]:
    """Update three times, the second with one `poison` among one rank's advantages; metrics and weights after each."""
    config.layout, config.algorithm.mini_batches = layout_config, 1
    config.layout.max_tokens_per_microbatch = 100
    layout = parallel.initialize(config.layout, seed=0)
    algorithm = build_algorithm(config)
    actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=10)
    batcher = actor.batcher
    groups = scored_groups(0, vocab=VOCAB)[layout.rank :: layout.world]
    table, samples = build_table(groups, step=0)
    batch = batcher.mini_batches_of(samples, table)[0]
    actor.score(batch.micro_batches, table, algorithm)
    experience = algorithm.assign_advantages(table, [batch])
    history = []
    for number in range(3):
        weighed = batcher.with_advantages(batch, experience, algorithm)
        if number == 1 and layout.dp_rank == 0:
            next(micro for micro in weighed.micro_batches if micro.targets.numel()).advantages[0] = poison
        metrics = actor.update(weighed, experience, algorithm)
        weights = {name: tensor.clone() for name, tensor in actor.export()}
        history.append((metrics, weights))
    return history


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(1, LayoutConfig(), id="one rank"),
        pytest.param(2, LayoutConfig(), id="DP2"),
        pytest.param(4, LayoutConfig(tp=2, pp=2), id="TP2 x PP2"),
    ],
)
def test_a_gradient_that_is_not_finite_is_skipped_on_every_rank(
    world: int, layout: LayoutConfig, poison: float, ranks: RankPool, tmp_path: Path
) -> None:
    config = configuration(tiny_llama(tmp_path, vocab=VOCAB, layers=2))
    config.clipo.enabled = False
    for history in ranks.run(broken_then_sound, world, config, layout, poison):
        (first, before), (second, same), (third, after) = history
        assert [each["policy/update_skipped"] for each in (first, second, third)] == [0.0, 1.0, 1.0]  # of the step
        assert [each["policy/skipped_in_a_row"] for each in (first, second, third)] == [0.0, 1.0, 0.0]
        assert not math.isfinite(second["policy/grad_norm"]) and math.isfinite(third["policy/grad_norm"])
        assert all(torch.equal(before[name], same[name]) for name in before)
        assert all(tensor.isfinite().all() and not torch.equal(before[name], tensor) for name, tensor in after.items())


def nothing_to_learn(config: RunConfig, layout_config: LayoutConfig, correct: bool | None) -> Any:
    """A step in which every verdict is the same; its metrics, and which weights are finite after it."""
    config.layout = layout_config
    layout = parallel.initialize(config.layout, seed=0)
    algorithm = build_algorithm(config)
    actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=10)
    batcher = actor.batcher
    verdict = Verdict(correct, 1.0 if correct else 0.0)
    groups = [
        ScoredGroup(each.group, [verdict] * len(each.group.rollouts))
        for each in scored_groups(0, vocab=VOCAB)[layout.rank :: layout.world]
    ]
    table, samples = build_table(groups, step=0)
    mini_batches = batcher.mini_batches_of(samples, table)
    metrics = actor.score([micro for batch in mini_batches for micro in batch.micro_batches], table, algorithm)
    experience = algorithm.assign_advantages(table, mini_batches)
    for batch in mini_batches:
        metrics |= actor.update(batcher.with_advantages(batch, experience, algorithm), experience, algorithm)
    return metrics, {name: bool(tensor.isfinite().all()) for name, tensor in actor.export()}


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("correct", [True, False, None])
def test_a_step_without_a_signal_passes(
    correct: bool | None, aggregation: Aggregation, ranks: RankPool, tmp_path: Path
) -> None:
    """All correct, all wrong, or nothing graded: the gradient is zero, and nothing fails."""
    config = configuration(tiny_llama(tmp_path, vocab=VOCAB, layers=2))
    config.algorithm.aggregation, config.algorithm.constant_length = aggregation, 15
    layout = LayoutConfig(tp=2, sequence_parallel=True)
    for metrics, finite in ranks.run(nothing_to_learn, 4, config, layout, correct):
        assert metrics["policy/grad_norm"] == 0.0 and metrics["policy/update_skipped"] == 0.0
        assert all(math.isfinite(value) for value in metrics.values()) and all(finite.values())


def taking_turns(config: RunConfig, layout_config: LayoutConfig) -> list[dict[str, Any]]:
    """Train the same steps without and with offloading before each."""
    results = []
    for turns in (False, True):
        results.append(train(config, layout_config, taking_turns=turns))
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.parametrize("dtype", [DType.fp32, DType.bf16])
def test_offloading_between_steps_changes_nothing(ranks: RankPool, tmp_path: Path, dtype: DType):
    config = configuration(tiny_llama(tmp_path, layers=2))
    config.model.dtype = dtype
    config.algorithm.kl.coefficient = 0.01  # keeps a reference policy
    for kept, turned in ranks.run(taking_turns, 2, config, LayoutConfig(pp=2)):
        assert turned["held"] == 0
        assert kept["updates"] == turned["updates"]
        for name, weight in kept["weights"].items():
            assert torch.equal(weight, turned["weights"][name]), name
