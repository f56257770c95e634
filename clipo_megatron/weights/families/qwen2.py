"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipo_megatron.weights.families.decoder import decoder_rules as rules
from clipo_megatron.weights.spec import ModelSpec, decoder_spec, refuse_if_set

__all__ = ["rules", "spec"]


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Architecture facts; refuses sliding windows that are switched on: some layers would have them, others not."""
    refuse_if_set(config, "use_sliding_window", "every layer attends to the whole sequence")
    return decoder_spec({"num_key_value_heads": 32, **config}, qkv_bias=True)
