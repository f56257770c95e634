"""The critic's model: the policy's architecture with one number a position in place of the LM head."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from clipo_megatron.policy.model.model import PolicyStage
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.weights.spec import ModelSpec


def fresh_head(hidden_size: int, seed: int) -> Tensor:
    """Weights of a new value head, [1, H] float32, the same on every rank: normal with deviation 1 / (H + 1), so that
    first values are small beside rewards."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1)


class ValueStage(PolicyStage):
    """One pipeline stage of a value model. The last one ends in a linear value head H -> 1 without bias, whole on every
    tensor-parallel rank. There is no LM head, and no second embedding where the model ties the two.

    Args:
        spec: of the language model that it is made from.
        config: Megatron's, one of its own.
        layout: this rank's place.
        seed: of the value head.
    """

    has_lm_head = False
    own_parameters = frozenset({"value_head.weight"})

    def __init__(self, spec: ModelSpec, config: TransformerConfig, layout: Layout, *, seed: int):
        super().__init__(spec, config, layout)
        if self.place.last:
            # Megatron builds the final norm only where it builds the LM head
            block = self.decoder
            block.post_process = True
            block.final_layernorm = build_module(
                block.submodules.layer_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
            self.value_head = torch.nn.utils.skip_init(torch.nn.Linear, spec.hidden_size, 1, bias=False)
            self.value_head.weight.data.copy_(fresh_head(spec.hidden_size, seed))

    def _whole(self, hidden: Tensor) -> Tensor:
        """Whole states; every tensor-parallel rank computes the same values and the same gradient from them, so none is
        added up."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    def values(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Values of the states at some places of the packed row, [N] float32; last stage only."""
        states = hidden.index_select(0, places).float()
        return torch.nn.functional.linear(states, self.value_head.weight.float()).squeeze(1)
