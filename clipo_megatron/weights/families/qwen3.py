"""Qwen3 (dense): norms on each head's query and key, a head size of its own, no biases."""

from functools import partial

from clipo_megatron.weights.families.family import BIAS_ON_O_PROJ, QWEN, WHOLE_SEQUENCE, Family
from clipo_megatron.weights.server_layout import fused_projections
from clipo_megatron.weights.spec import decoder_spec

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    defaults=QWEN | {"num_key_value_heads": 32, "head_dim": 128},
    refused={"attention_bias": BIAS_ON_O_PROJ, "use_sliding_window": WHOLE_SEQUENCE},
    spec=partial(decoder_spec, qk_norm=True),
    server_layout=fused_projections,
)
