"""Phi-3 with plain rotary positions (Phi-3-mini-4k, Phi-3-medium-4k): q, k, v are one tensor, gate and up another."""

from __future__ import annotations

from functools import partial

from clipo_megatron.weights.families.decoder import HF, MEGATRON, decoder_rules
from clipo_megatron.weights.families.family import DECODER, Family
from clipo_megatron.weights.mapping import Rule, fused
from clipo_megatron.weights.server_layout import fused_projections
from clipo_megatron.weights.spec import ModelSpec, decoder_spec

FUSED = {
    MEGATRON + "self_attention.linear_qkv.weight": HF + "self_attn.qkv_proj.weight",
    MEGATRON + "mlp.linear_fc1.weight": HF + "mlp.gate_up_proj.weight",
}


def rules(spec: ModelSpec) -> list[Rule]:
    """The rules of a decoder, two of them reading fused tensors."""
    return [fused(rule, FUSED[rule.megatron]) if rule.megatron in FUSED else rule for rule in decoder_rules(spec)]


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    defaults=DECODER
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    refused=dict.fromkeys(("attention_bias", "mlp_bias"), "Phi-3 has no biases"),
    spec=partial(decoder_spec, windowed=True),
    rules=rules,
    server_layout=fused_projections,
    sglang_ignores_window=True,
)
