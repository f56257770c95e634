"""Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2, DeepSeek-R1-Distill-Llama and others with `model_type: llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipo_megatron.weights.families.decoder import decoder_rules as rules
from clipo_megatron.weights.spec import ModelSpec, decoder_spec, refuse_if_set

__all__ = ["rules", "spec"]


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Architecture facts; refuses biases: Megatron has them on all linear layers, or on q, k and v alone."""
    refuse_if_set(config, "attention_bias", "it puts a bias on o_proj, which Megatron cannot represent")
    refuse_if_set(config, "mlp_bias", "Megatron's gated MLP is built without biases")
    refuse_if_set(config, "sliding_window", "Llama attends to the whole sequence; with windows it is Mistral")
    return decoder_spec(config)
