"""Gradients that are reduced during the backward pass, and weights that are gathered during the next forward.

Several replicas do both unless they are told not to. Either way they train the same, to the bit with the same buckets.
In several buckets each rank holds other shards, so that the gradients' norm adds up its squares in another order; it is
reported, and does not act on the updates of these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_steps import configuration, train
from ranks import RankPool
from tiny_models import tiny_llama, tiny_qwen2, tiny_qwen3_moe

from clipo_megatron.config.schema import LayoutConfig, RunConfig
from clipo_megatron.policy.trainable import Trainable

BUCKET = 20_000  # parameters: several buckets even of a tiny model


def plain(folder: Path) -> RunConfig:
    return configuration(tiny_llama(folder, tied=False, vocab=263))


def tied_with_critic(folder: Path) -> RunConfig:
    config = configuration(tiny_qwen2(folder, tied=True, vocab=263))
    config.algorithm.name = "ppo"
    return config


def reference_and_group_loss(folder: Path) -> RunConfig:
    config = configuration(tiny_llama(folder, tied=True, vocab=263))
    config.algorithm.name, config.algorithm.epochs = "copg", 2
    return config


def experts(folder: Path) -> RunConfig:
    return configuration(tiny_qwen3_moe(folder, vocab=263))


CASES: dict[str, tuple[Callable[[Path], RunConfig], int, LayoutConfig]] = {
    "DP2": (plain, 2, LayoutConfig()),
    "DP2, tied, PPO": (tied_with_critic, 2, LayoutConfig()),
    "DP2, tied, reference": (reference_and_group_loss, 2, LayoutConfig()),
    "PP2 x DP2, experts over both": (experts, 4, LayoutConfig(pp=2, ep=2, etp=1)),
}
COSTLY = ("DP2, tied, PPO", "PP2 x DP2, experts over both")


def trained(config: RunConfig, layout: LayoutConfig, overlap: bool | None, bucket: int | None) -> dict[str, Any]:
    """Train on a rank; "late" says of each update in how many buckets weights were on their way afterwards."""
    config.optimizer.overlap_grad_reduce, config.optimizer.max_grad_norm = overlap, 1e6
    config.megatron = {"bucket_size": bucket}
    late: list[int] = []
    update = Trainable.update

    def watched(self: Trainable, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics = update(self, *arguments, **options)
        groups = [*self.model.bucket_groups, *self.model.expert_parallel_bucket_groups]
        late.append(sum(group.param_gather_handle is not None for group in groups))
        assert not (options.get("last", True) and late[-1]), "the last update leaves nothing to wait for"
        return metrics

    Trainable.update = watched
    try:
        facts = train(config, layout)
    finally:
        Trainable.update = update
    return {name: facts.get(name) for name in ("updates", "weights", "critic", "logprobs")} | {"late": late}


def distance(one: Any, other: Any) -> float:
    """The largest difference of two results, relative to the largest value of each tensor."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((distance(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(other)
        return max(map(distance, one, other), default=0.0)
    if one is None:
        return 0.0
    one, other = (torch.as_tensor(each, dtype=torch.float64) for each in (one, other))
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.full if case in COSTLY else ()) for case in CASES]
)
def test_replicas_train_the_same_with_communication_beside_computation(case: str, ranks: RankPool, tmp_path: Path):
    build, world, layout = CASES[case]
    config = build(tmp_path / "model")
    afterwards = ranks.run(trained, world, config, layout, False, None)
    assert all(not any(each.pop("late")) for each in afterwards)
    for bucket, tolerance in ((None, 0.0), (BUCKET, 1e-6)):
        beside = ranks.run(trained, world, config, layout, None, bucket)
        for ours, theirs in zip(beside, afterwards, strict=True):
            assert max(ours.pop("late")) >= 1, "the default gathers weights late"
            assert distance(ours, theirs) <= tolerance
