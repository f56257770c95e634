"""Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2, DeepSeek-R1-Distill-Llama and others with `model_type: llama`."""

from clipo_megatron.weights.families.family import BIAS_ON_O_PROJ, DECODER, NO_MLP_BIAS, Family
from clipo_megatron.weights.server_layout import fused_projections

FAMILY = Family(
    architecture="LlamaForCausalLM",
    defaults=DECODER | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    refused={
        "attention_bias": BIAS_ON_O_PROJ,
        "mlp_bias": NO_MLP_BIAS,
        "sliding_window": "Llama attends to the whole sequence; with a window the model is a Mistral",
    },
    server_layout=fused_projections,
)
