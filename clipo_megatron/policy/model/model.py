"""The policy as a Megatron GPT stage whose forward takes packed segments and ends at the LM head's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.packages import other_version
from clipo_megatron.config.schema import DType, ModelConfig
from clipo_megatron.flow import MicroBatch
from clipo_megatron.policy.megatron_fields import configured
from clipo_megatron.policy.model.attention import AttentionPlan, PackedAttention, plan_attention
from clipo_megatron.policy.model.experts import adapt_experts, adapt_sparse_layer, expert_settings, replay_routes
from clipo_megatron.policy.model.logprobs import token_logprobs
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.mapping import PipelineStage
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import VOCAB_MULTIPLE_ON_GPUS
from clipo_megatron.weights.spec import ModelSpec, inverse_frequencies

TORCH_DTYPE = {DType.fp32: torch.float32, DType.bf16: torch.bfloat16}


def transformer_engine_usable() -> bool:
    """Whether transformer-engine's layers are installed and can run here.

    Raises:
        ConfigError: they are of a release that the installed Megatron does not work with.
    """
    if not platform().has_gpu:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    if problem := other_version("transformer-engine", wanted_by="megatron-core"):
        raise ConfigError("{}; {}.".format(*problem))
    return True


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron's sequence parallelism: its weight's gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        device = None if config.use_cpu_initialization else platform().device
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def transformer_config(
    spec: ModelSpec, model: ModelConfig, layout: Layout, megatron: Mapping[str, Any] | None = None
) -> TransformerConfig:
    """Megatron's configuration for an architecture in a layout, with the fields of the section `megatron`.

    Raises:
        ConfigError: Megatron refuses these fields.
    """
    bf16 = model.dtype is DType.bf16
    return configured(
        TransformerConfig,
        megatron or {},
        owned={
            "num_layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "ffn_hidden_size": spec.ffn_hidden_size,
            "num_attention_heads": spec.num_heads,
            "num_query_groups": spec.num_kv_heads,
            "kv_channels": spec.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": spec.rms_norm_eps,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": spec.qkv_bias,
            "qk_layernorm": spec.qk_norm,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "context_parallel_size": layout.share.size,
            **_stage_sizes(layout.division),
            "expert_model_parallel_size": layout.division.ep,
            "expert_tensor_parallel_size": layout.division.expert_tp,
            "sequence_parallel": layout.sequence_parallel,
            "pipeline_dtype": TORCH_DTYPE[model.dtype],
            "params_dtype": TORCH_DTYPE[model.dtype],
            "bf16": bf16,
            "variable_seq_lengths": True,
            "perform_initialization": False,
            "calculate_per_token_loss": True,  # gradients are sums; see policy.optimizer
            **expert_settings(spec, grouped=transformer_engine_usable()),
            **_recomputation(model),
        },
        defaults={
            "attention_softmax_in_fp32": True,
            "moe_token_dispatcher_type": "alltoall",  # the default refuses variable lengths, even in a dense model
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,  # without dropout and biases there is nothing to fuse, and it is compiled
            "persist_layer_norm": transformer_engine_usable(),
            **_fused_kernels(),
        },
    )


def _recomputation(model: ModelConfig) -> dict[str, str | int]:
    """Megatron's settings that recompute every layer; {}: only what the section `megatron` says is recomputed."""
    if not model.recompute:
        return {}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _fused_kernels() -> dict[str, bool]:
    """The kernels of Megatron that do several things at once, where what they need is installed.

    SwiGLU needs torch's compiler, with which every GPU build comes. Rotary embeddings are transformer-engine's, for
    packed sequences too. Gradients are added up by an extension of apex.
    """
    return {
        "bias_activation_fusion": platform().has_gpu,
        "apply_rope_fusion": transformer_engine_usable(),
        "gradient_accumulation_fusion": platform().has_gpu and _grad_accum_fusion_available,
    }


def _stage_sizes(division: ParallelDivision) -> dict[str, int | None]:
    """Megatron's settings for uneven pipeline stages and for several model chunks a rank."""
    if division.pp == 1:
        return {}
    return {
        "num_layers_in_first_pipeline_stage": division.first_layers,
        "num_layers_in_last_pipeline_stage": division.last_layers,
        "virtual_pipeline_model_parallel_size": division.vpp if division.vpp > 1 else None,
    }


def _block_spec(spec: ModelSpec, stage: PipelineStage) -> TransformerBlockSubmodules:
    """The layers of one stage: transformer-engine's where it can run, else Megatron's with our norm; our attention."""
    layers = [_layer_spec(spec, spec.is_sparse(stage.offset + layer)) for layer in range(stage.layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm if transformer_engine_usable() else RMSNorm)


def _layer_spec(spec: ModelSpec, sparse: bool) -> ModuleSpec:
    experts = spec.experts.count if sparse else None
    if transformer_engine_usable():
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=sparse, qk_layernorm=spec.qk_norm
        )
        layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return layer
    layer = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=spec.qk_norm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if spec.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if sparse:
        adapt_sparse_layer(layer)
    return layer


def _padded_vocab(size: int, tp: int, multiple: int | None) -> int:
    """Round `size` up so that each of `tp` shards has a multiple of `multiple` rows; None: 64 on GPUs, else 1."""
    shards = tp * (multiple or (VOCAB_MULTIPLE_ON_GPUS if platform().has_gpu else 1))
    return -(-size // shards) * shards


def build_stages(
    spec: ModelSpec, config: TransformerConfig, layout: Layout, *, vocab_multiple: int | None = None
) -> list[PolicyStage]:
    """This rank's model chunks: one, or several with virtual pipeline stages."""
    return [PolicyStage(spec, config, layout, chunk, vocab_multiple) for chunk in range(layout.division.vpp)]


class PolicyStage(GPTModel):
    """One pipeline stage of the policy, or one of its virtual stages.

    Args:
        spec: the architecture of the model.
        config: Megatron's configuration, from `transformer_config`.
        layout: this rank's place in the parallel layout.
        chunk: which of the rank's model chunks; 0 without virtual stages.
        vocab_multiple: each rank's rows of the vocabulary are padded to a multiple of it; None: see `_padded_vocab`.

    Attributes:
        has_lm_head: whether the last stage ends in an LM head.
        own_parameters: names of parameters that language models do not have.
    """

    has_lm_head = True
    own_parameters: frozenset[str] = frozenset()

    def __init__(
        self,
        spec: ModelSpec,
        config: TransformerConfig,
        layout: Layout,
        chunk: int = 0,
        vocab_multiple: int | None = None,
    ):
        self.place = layout.division.stages(spec.num_layers)[layout.pp_rank + chunk * layout.pp]
        super().__init__(
            config=config,
            transformer_layer_spec=_block_spec(spec, self.place),
            vocab_size=_padded_vocab(spec.vocab_size, layout.tp, vocab_multiple),
            max_sequence_length=spec.max_positions,
            pre_process=self.place.first,
            post_process=self.place.last and self.has_lm_head,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tied_embeddings and self.has_lm_head,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None,
        )
        self.spec = spec
        self.layout = layout
        self.share = layout.share
        adapt_experts(self, dispatchers=not transformer_engine_usable())
        if self.has_lm_head:  # the engine's experts are the policy's, not those of a critic
            replay_routes(self)
        # Megatron hard-codes llama3's scaling constants; the model's config.json has the exact ones.
        self.rotary_pos_emb.inv_freq = inverse_frequencies(spec).to(platform().device)

    def forward(self, micro: MicroBatch) -> Tensor:
        """Run this stage.

        Returns:
            On the last stage the hidden states after the final norm, [T, H] on every tensor-parallel rank. On the
            others the input of the next stage, [T, 1, H], or [T / tp, 1, H] with sequence parallelism. T counts the
            tokens of this rank's part of the row.
        """
        tokens, positions = self.share.take(micro.tokens), self.share.take(micro.positions)
        embedded = self.embedding(tokens[None], positions[None]) if self.pre_process else None
        plan, rotary = self._segments(micro)
        hidden = self.decoder(
            hidden_states=embedded, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=plan
        )
        return self._whole(hidden) if self.place.last else hidden

    def _whole(self, hidden: Tensor) -> Tensor:
        """The last stage's states [T, H] on every tensor-parallel rank.

        Their gradients are added up over these ranks, because each has a shard of the vocabulary.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden).squeeze(1)
        return copy_to_tensor_model_parallel_region(hidden).squeeze(1)

    def _segments(self, micro: MicroBatch) -> tuple[AttentionPlan, Tensor]:
        """The attention of the row's segments, and the rotary angles of its tokens."""
        longest = max(segment.context_length + segment.length for segment in micro.segments)
        table = self.rotary_pos_emb.get_emb(longest)  # [longest, 1, 1, head_dim]
        plan = plan_attention(micro.segments, micro.tokens.device, self.spec.sliding_window, self.share)
        if micro.routes is not None:
            plan.routes = self._own_routes(micro.routes)
        return plan, table[self.share.take(micro.positions)]

    def _own_routes(self, routes: Tensor) -> Tensor:
        """Routes [T, L, E] of the tokens that this rank's layers route: with sequence parallelism its part of them."""
        own = self.share.take(routes)
        if self.config.sequence_parallel:
            own = own.chunk(self.layout.tp)[self.layout.tp_rank]
        return own.to(platform().device)

    def logprobs(
        self, hidden: Tensor, micro: MicroBatch, *, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log-probs of the micro-batch's targets, and entropies if asked for, [N] float32; last stage only.

        The LM head's gradient is added to Megatron's fp32 buffer directly, unless the head is tied to the embedding of
        the same stage: autograd then has to add the two gradients.
        """
        weight = self.shared_embedding_or_output_weight() if self.spec.tied_embeddings else self.output_layer.weight
        alone = not (self.spec.tied_embeddings and self.pre_process)
        main_grad = getattr(weight, "main_grad", None) if alone and torch.is_grad_enabled() else None
        places, chosen = self.share.own(micro.predict, micro.tokens.numel())
        logprobs, entropies = token_logprobs(
            hidden.index_select(0, places),
            weight,
            micro.targets[chosen],
            vocab_start=self.layout.tp_rank * weight.shape[0],
            vocab_size=self.spec.vocab_size,
            temperature=temperature,
            tp_group=self.layout.tp_group if self.layout.tp > 1 else None,
            main_grad=main_grad,
            entropy=entropy,
            support=None if micro.support is None else micro.support.to(hidden.device)[chosen],
        )
        logprobs, entropies = (
            None if each is None else self.share.shared(each, chosen, micro.targets.numel())
            for each in (logprobs, entropies)
        )
        return logprobs, entropies

    def pooled_states(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """The mean state of each rollout's response tokens, [K, H] float32: h_i of arXiv 2603.10101.

        The paper's code differs: it leaves out one state and divides the sum of the other R - 1 by R.
        """
        lengths = torch.bincount(micro.rollout, minlength=micro.rows.numel())
        sums = torch.zeros(micro.rows.numel(), hidden.shape[1], dtype=torch.float32, device=hidden.device)
        places, chosen = self.share.own(micro.states, micro.tokens.numel())
        sums.index_add_(0, micro.rollout[chosen], hidden.index_select(0, places).float())
        return self.share.summed(sums) / lengths[:, None]
