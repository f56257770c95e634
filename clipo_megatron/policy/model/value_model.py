"""The critic's model: the policy's architecture with a linear value head in place of the LM head."""

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
    """The weights of a new value head, [1, H] float32, identical on every rank.

    They are normal with a standard deviation of 1 / (H + 1), so that the first values are small beside rewards.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1)


class ValueStage(PolicyStage):
    """One pipeline stage of a value model.

    The last stage ends in a linear value head H -> 1 without bias, whole on every tensor-parallel rank. There is no LM
    head, and on the last of several stages no copy of the embeddings where the language model ties the two.

    Args:
        spec: the architecture of the language model that it is made from.
        config: Megatron's configuration, which no other stage may share.
        layout: this rank's place in the parallel layout.
        seed: seed of the value head's weights.
    """

    has_lm_head = False
    own_parameters = frozenset({"value_head.weight"})

    def __init__(self, spec: ModelSpec, config: TransformerConfig, layout: Layout, *, seed: int):
        super().__init__(spec, config, layout)
        if self.place.last:
            # Megatron builds the final norm only where it builds the LM head.
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
        """The last stage's states [T, H] on every tensor-parallel rank.

        Their gradients are not added up: every rank computes the same values, and so the whole gradient.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    def values(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Compute the values [N] float32 of the states at `places` of the packed row; last stage only."""
        own, chosen = self.share.own(places, hidden.shape[0] * self.share.size)
        states = hidden.index_select(0, own).float()
        values = torch.nn.functional.linear(states, self.value_head.weight.float()).squeeze(1)
        return self.share.shared(values, chosen, places.numel())
