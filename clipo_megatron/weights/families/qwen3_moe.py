"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, and a mixture of experts in place of most MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families.decoder import decoder_rules as rules
from clipo_megatron.weights.spec import Experts, ModelSpec, decoder_spec, refuse_if_set

__all__ = ["rules", "spec"]


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Architecture facts; refuses biases, sliding windows, shared experts and counts that make no sense."""
    refuse_if_set(config, "attention_bias", "it puts a bias on o_proj, which Megatron cannot represent")
    refuse_if_set(config, "use_sliding_window", "every layer attends to the whole sequence")
    refuse_if_set(config, "shared_expert_intermediate_size", "shared experts are not implemented")
    dense = decoder_spec(config, qk_norm=True)
    return replace(dense, experts=_experts(config, dense.num_layers))


def _experts(config: Mapping[str, Any], layers: int) -> Experts:
    # transformers 5 writes the count under another name than the releases have it under.
    field = "num_experts" if "num_experts" in config else "num_local_experts"
    count, per_token = _positive(config, field), _positive(config, "num_experts_per_tok")
    if per_token > count:
        raise UnsupportedModel("num_experts_per_tok", per_token, f"there are only {field}={count} experts")
    renormalised = bool(config.get("norm_topk_prob", False))
    if renormalised and per_token == 1:
        raise UnsupportedModel(
            "norm_topk_prob", True, "with num_experts_per_tok=1 every probability is 1, and the router learns nothing"
        )
    step = _positive(config, "decoder_sparse_step") if "decoder_sparse_step" in config else 1
    plain = set(config.get("mlp_only_layers") or ())
    dense_layers = frozenset(layer for layer in range(layers) if layer in plain or (layer + 1) % step)
    if len(dense_layers) == layers:
        raise UnsupportedModel("mlp_only_layers", sorted(plain), "no layer has experts; such a model is a plain Qwen3")
    return Experts(count, per_token, _positive(config, "moe_intermediate_size"), renormalised, dense_layers)


def _positive(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(field, value, "a positive whole number is needed")
    return value
