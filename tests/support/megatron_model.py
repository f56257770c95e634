"""Builds Megatron's own GPT model as one rank of a layout holds it, without the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.spec import ModelSpec, inverse_frequencies

VOCAB = 263


@contextmanager
def megatron_model(spec: ModelSpec, tp: int, pp: int, rank: int) -> Iterator[GPTModel]:
    """Build Megatron's model as one rank of a layout holds it; the other ranks do not exist."""
    platform().adapt("megatron.core")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp)
    try:
        parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        config = TransformerConfig(
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            ffn_hidden_size=spec.ffn_hidden_size,
            num_attention_heads=spec.num_heads,
            num_query_groups=spec.num_kv_heads,
            kv_channels=spec.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=spec.rms_norm_eps,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=spec.qkv_bias,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.float32,
            perform_initialization=False,
            use_cpu_initialization=True,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            gradient_accumulation_fusion=False,
            bias_dropout_fusion=False,
        )
        built = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=-(-VOCAB // (8 * tp)) * 8 * tp,
            max_sequence_length=64,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            parallel_output=False,
        )
        built.rotary_pos_emb.inv_freq = inverse_frequencies(spec)
        yield built
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
