"""Mistral 7B (v0.1 with its sliding window, v0.2, v0.3) and Mistral-Nemo: Llama with windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipo_megatron.weights.families.decoder import decoder_rules as rules
from clipo_megatron.weights.spec import ModelSpec, decoder_spec, refuse_if_set

__all__ = ["rules", "spec"]

# What transformers takes where config.json is silent. A window of null is no window, and is not silence.
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Architecture facts; every layer has the window."""
    for field in ("attention_bias", "mlp_bias"):
        refuse_if_set(config, field, "Mistral has no biases")
    known = {**DEFAULTS, **config}
    return decoder_spec(known, sliding_window=known["sliding_window"])
