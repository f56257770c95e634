"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, and a mixture of experts in place of most MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families.family import BIAS_ON_O_PROJ, QWEN, WHOLE_SEQUENCE, Family
from clipo_megatron.weights.server_layout import fused_projections
from clipo_megatron.weights.spec import Experts, ModelSpec, decoder_spec, positive_number


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read the facts of the model; refuses numbers of experts that make no sense."""
    dense = decoder_spec(config, qk_norm=True)
    return replace(dense, experts=_experts(config, dense.num_layers))


def _experts(config: Mapping[str, Any], layers: int) -> Experts:
    # transformers 5 writes the number under another name than released models have it under.
    field = "num_local_experts" if "num_local_experts" in config and "num_experts" not in config else "num_experts"
    config = {"num_experts": 128, **config}  # transformers' number, where neither name is given
    count, per_token = positive_number(config, field), positive_number(config, "num_experts_per_tok")
    if per_token > count:
        raise UnsupportedModel("num_experts_per_tok", per_token, f"there are only {field}={count} experts")
    renormalised = bool(config.get("norm_topk_prob", False))
    if renormalised and per_token == 1:
        raise UnsupportedModel(
            "norm_topk_prob", True, "with num_experts_per_tok=1 every probability is 1, and the router learns nothing"
        )
    step = positive_number(config, "decoder_sparse_step") if "decoder_sparse_step" in config else 1
    plain = set(config.get("mlp_only_layers") or ())
    dense_layers = frozenset(layer for layer in range(layers) if layer in plain or (layer + 1) % step)
    if len(dense_layers) == layers:
        raise UnsupportedModel("mlp_only_layers", sorted(plain), "no layer has experts; such a model is a plain Qwen3")
    return Experts(count, per_token, positive_number(config, "moe_intermediate_size"), renormalised, dense_layers)


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    defaults=QWEN
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    refused={
        "attention_bias": BIAS_ON_O_PROJ,
        "use_sliding_window": WHOLE_SEQUENCE,
        "shared_expert_intermediate_size": "shared experts are not implemented",
    },
    spec=spec,
    server_layout=fused_projections,
)
