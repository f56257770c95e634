"""Phi-3 with plain rotary positions (Phi-3-mini-4k, Phi-3-medium-4k): q, k, v are one tensor, gate and up another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipo_megatron.weights.families.decoder import HF, MEGATRON, decoder_rules
from clipo_megatron.weights.mapping import Rule, fused
from clipo_megatron.weights.spec import ModelSpec, decoder_spec, refuse_if_set

FUSED = {
    MEGATRON + "self_attention.linear_qkv.weight": HF + "self_attn.qkv_proj.weight",
    MEGATRON + "mlp.linear_fc1.weight": HF + "mlp.gate_up_proj.weight",
}
DEFAULTS = {"rms_norm_eps": 1e-5}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Architecture facts; every layer has the window, if there is one."""
    for field in ("attention_bias", "mlp_bias"):
        refuse_if_set(config, field, "Phi-3 has no biases")
    return decoder_spec({**DEFAULTS, **config}, sliding_window=config.get("sliding_window"))


def rules(spec: ModelSpec) -> list[Rule]:
    """The decoder's, two of them from fused tensors."""
    return [fused(rule, FUSED[rule.megatron]) if rule.megatron in FUSED else rule for rule in decoder_rules(spec)]
