"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: biases on q, k and v."""

from functools import partial

from clipo_megatron.weights.families.family import QWEN, WHOLE_SEQUENCE, Family
from clipo_megatron.weights.server_layout import fused_projections
from clipo_megatron.weights.spec import decoder_spec

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    defaults=QWEN | {"num_key_value_heads": 32},
    refused={"use_sliding_window": WHOLE_SEQUENCE},
    spec=partial(decoder_spec, qkv_bias=True),
    server_layout=fused_projections,
)
