"""Mixtures of experts in Megatron's layers: their settings, and what Megatron's own parts need to run without
transformer-engine and on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from clipo_megatron.weights.spec import ModelSpec


def expert_settings(spec: ModelSpec, *, grouped: bool) -> dict[str, Any]:
    """Of a TransformerConfig: routing as transformers has it, no token dropped, no auxiliary loss.

    `grouped`: one kernel computes a rank's experts together; transformer-engine's layers alone do that.
    """
    if spec.experts is None:
        return {}
    return {
        "num_moe_experts": spec.experts.count,
        "moe_router_topk": spec.experts.per_token,
        "moe_ffn_hidden_size": spec.experts.ffn_hidden_size,
        "moe_layer_freq": [int(spec.is_sparse(layer)) for layer in range(spec.num_layers)],
        # A softmax over the chosen experts' logits is the one over all experts', renormalised.
        "moe_router_pre_softmax": not spec.experts.renormalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": grouped,
    }


def adapt_sparse_layer(layer: ModuleSpec) -> None:
    """Make Megatron's local spec of a layer with experts run anywhere, and its checkpoints portable.

    The model built from it wants `adapt_experts` as well.
    """
    parts = layer.submodules
    parts.mlp.submodules.router = Router
    # Checkpoints know this norm by the name it has with transformer-engine, which fuses that of a dense layer alone.
    keys = parts.sharded_state_dict_keys_map
    parts.sharded_state_dict_keys_map = {key: name for key, name in keys.items() if key != "pre_mlp_layernorm."}


class Router(TopKRouter):
    """Megatron's router, its logits in fp32: Megatron's own way to those needs transformer-engine."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., experts] float32 of hidden states [..., H]."""
        return torch.nn.functional.linear(input.float(), self.weight.float())


class TokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's exchange of tokens, with counts as numbers also where they do not come from a GPU, and no memory."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(counts := getattr(self, name), Tensor) and counts.device.type == "cpu":
                setattr(self, name, counts.numpy())
        return tokens_per_expert

    def combine_postprocess(self, permuted_local_hidden_states: Tensor) -> Tensor:
        """Put tokens back in order, and forget the router's probabilities."""
        output = super().combine_postprocess(permuted_local_hidden_states)
        # They are part of the graph, which lives until the next forward otherwise, and with it, in a cycle that Python
        # cannot see, the model: autograd's nodes hold the hooks of Megatron's data-parallel wrapper.
        self.probs = None
        return output


def adapt_experts(model: torch.nn.Module, *, dispatchers: bool) -> None:
    """Have experts' gradients summed over the copies of experts, and all layers use the dispatcher above if asked to.

    Megatron (0.16.1) takes the copies of everything else where there is one expert-parallel rank, which is wrong when
    experts are divided over fewer tensor-parallel ranks than all else.
    """
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        for parameter in layer.experts.parameters():
            parameter.allreduce = False
        if dispatchers:
            layer.token_dispatcher = TokenDispatcher(
                layer.num_local_experts,
                layer.local_expert_indices,
                config=layer.config,
                pg_collection=get_default_pg_collection(),
            )
