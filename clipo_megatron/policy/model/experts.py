"""Mixtures of experts in Megatron's layers, and what these need to run without transformer-engine and on CPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from clipo_megatron.weights.spec import ModelSpec


def expert_settings(spec: ModelSpec, *, grouped: bool) -> dict[str, Any]:
    """Settings of a TransformerConfig for experts: routing as in transformers, no dropped tokens, no auxiliary loss.

    `grouped`: whether one kernel computes all experts of a rank, which only transformer-engine's layers can do.
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
    """Change Megatron's local spec of a layer with experts so that it runs anywhere and its checkpoints are portable.

    The model that is built from it needs `adapt_experts` as well.
    """
    parts = layer.submodules
    # Newer releases of Megatron (0.19.2) build the experts by a partial function in place of a spec.
    mixture = parts.mlp.keywords["submodules"] if isinstance(parts.mlp, partial) else parts.mlp.submodules
    mixture.router = Router
    # In checkpoints the norm before experts has the name that transformer-engine gives it: it fuses the norm of dense
    # layers only.
    keys = parts.sharded_state_dict_keys_map
    parts.sharded_state_dict_keys_map = {key: name for key, name in keys.items() if key != "pre_mlp_layernorm."}


class Router(TopKRouter):
    """Megatron's router with logits in fp32, which Megatron's own code computes with transformer-engine only."""

    def gating(self, input: Tensor) -> Tensor:
        """Compute logits [..., experts] float32 from hidden states [..., H]."""
        return torch.nn.functional.linear(input.float(), self.weight.float())


class TokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's exchange of tokens between experts, made to work on CPUs and to let go of the graph afterwards."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        # Megatron converts the counts to numbers only when they come from a GPU.
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(counts := getattr(self, name), Tensor) and counts.device.type == "cpu":
                setattr(self, name, counts.numpy())
        return tokens_per_expert

    def combine_postprocess(self, permuted_local_hidden_states: Tensor) -> Tensor:
        """Put tokens back in order, and drop the router's probabilities."""
        output = super().combine_postprocess(permuted_local_hidden_states)
        # They belong to the autograd graph and would keep it alive until the next forward. The graph's nodes hold hooks
        # of Megatron's data-parallel wrapper, so the model would be kept too, in a cycle that Python cannot see.
        self.probs = None
        return output


class RouteReplay(RouterReplay):
    """Sends tokens to the experts that an engine chose for them, and others where the router would.

    The chosen experts' probabilities are the router's own, and its gate learns through them. Megatron's class replays
    whole batches in the order in which it was given them; here a layer is given those of the micro-batch that it
    computes, also where it computes it again in the backward pass.
    """

    def __init__(self) -> None:
        """Leaves Megatron's list of all routers alone."""
        self.routes: Tensor | None = None  # [n, E] int16, -1 where nobody chose

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: Any = None,
        group_topk: Any = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores [n, topk] of the experts that tokens are sent to, and their numbers."""
        own, indices = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.routes is None:
            return own, indices
        indices = torch.where(self.routes >= 0, self.routes.to(indices.dtype), indices)
        return scores.gather(1, indices), indices


def replay_routes(model: torch.nn.Module) -> None:
    """Let every layer with experts take the routes of its attention plan, if that has any."""

    def take_routes(layer: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routes = kwargs["packed_seq_params"].routes
        layer.mlp.router.router_replay.routes = None if routes is None else routes[:, layer.layer_number - 1]

    for layer in model.modules():
        if isinstance(layer, TransformerLayer) and isinstance(layer.mlp, MoELayer):
            layer.mlp.router.router_replay = RouteReplay()
            layer.register_forward_pre_hook(take_routes, with_kwargs=True)


def adapt_experts(model: torch.nn.Module, *, dispatchers: bool) -> None:
    """Let experts' gradients be summed over the copies of the experts, and install `TokenDispatcher` if asked to.

    With one expert-parallel rank, Megatron (0.16.1) sums them over the copies of all other weights, which is wrong when
    experts are divided over fewer tensor-parallel ranks than these.
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
