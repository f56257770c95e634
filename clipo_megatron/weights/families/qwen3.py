"""Qwen3 (dense): norms on each head's query and key, a head size of its own, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipo_megatron.weights.families.decoder import decoder_rules as rules
from clipo_megatron.weights.spec import ModelSpec, decoder_spec, refuse_if_set

__all__ = ["rules", "spec"]

DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128}  # what transformers takes where config.json is silent


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Architecture facts; refuses biases (they include o_proj's) and sliding windows that some layers would have."""
    refuse_if_set(config, "attention_bias", "it puts a bias on o_proj, which Megatron cannot represent")
    refuse_if_set(config, "use_sliding_window", "every layer attends to the whole sequence")
    return decoder_spec({**DEFAULTS, **config}, qk_norm=True)
