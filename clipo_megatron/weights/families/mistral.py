"""Mistral 7B (v0.1 with its sliding window, v0.2, v0.3) and Mistral-Nemo: Llama with a window in every layer."""

from functools import partial

from clipo_megatron.weights.families.family import DECODER, Family
from clipo_megatron.weights.server_layout import fused_projections
from clipo_megatron.weights.spec import decoder_spec

FAMILY = Family(
    architecture="MistralForCausalLM",
    # A sliding_window of null means that there is none; only an absent one means 4096.
    defaults=DECODER
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    refused=dict.fromkeys(("attention_bias", "mlp_bias"), "Mistral has no biases"),
    spec=partial(decoder_spec, windowed=True),
    server_layout=fused_projections,
    sglang_ignores_window=True,
)
