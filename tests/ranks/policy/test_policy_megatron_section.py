"""Fields of the section `megatron` change how a model is computed, and not what it learns.

What is computed again is the same to the bit. Fused SwiGLU rounds otherwise, which six updates make larger.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_steps import configuration, train
from ranks import RankPool
from test_policy_overlap import distance
from tiny_models import tiny_llama, tiny_qwen3_moe

from clipo_megatron.config.schema import LayoutConfig, RunConfig

SELECTIVE = {"recompute_granularity": "selective"}


def trained(config: RunConfig, megatron: dict[str, Any]) -> dict[str, Any]:
    """Train on a rank; what Megatron has compiled runs without a compiler."""
    config.megatron = megatron
    with torch.compiler.set_stance("force_eager"):
        facts = train(config, LayoutConfig())
    return {name: facts[name] for name in ("updates", "weights", "logprobs")}


@pytest.mark.parametrize(
    ("family", "megatron", "tolerance"),
    [
        (tiny_llama, {**SELECTIVE, "recompute_modules": ["mlp"]}, 0.0),
        (tiny_llama, {"bias_activation_fusion": True}, 5e-5),
        pytest.param(tiny_qwen3_moe, {**SELECTIVE, "recompute_modules": ["moe"]}, 0.0, marks=pytest.mark.full),
        pytest.param(tiny_qwen3_moe, {"bias_activation_fusion": True}, 5e-5, marks=pytest.mark.full),
    ],
    ids=["mlp recomputed", "fused SwiGLU", "experts recomputed", "fused SwiGLU of experts"],
)
def test_a_run_learns_the_same(
    family: Callable[..., Path], megatron: dict[str, Any], tolerance: float, ranks: RankPool, tmp_path: Path
) -> None:
    config = configuration(family(tmp_path / "model", vocab=263))
    (plain,), (changed,) = (ranks.run(trained, 1, config, given) for given in ({}, megatron))
    assert distance(changed, plain) <= tolerance
