"""A critic's weights by Hugging Face name, from any layout."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import from_last_stage
from clipo_megatron.weights.export import export

HEAD = "value_head.weight"


def by_name(actor: PolicyActor, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather one tensor for each parameter of the critic: whole, by Hugging Face name, on every rank."""
    head = from_last_stage(own.get(HEAD), actor.layout)
    own = {name: each for name, each in own.items() if name != HEAD}
    if actor.layout.is_last_stage:  # exporting wants an LM head, which a critic has not
        output = dict(actor.stage.named_parameters()).get("output_layer.weight")
        own |= {} if output is None else {"output_layer.weight": torch.zeros_like(output)}
    found = {name: each.clone() for name, each in export(actor.export_plan, [own], actor.layout.holder)}
    found.pop("lm_head.weight", None)
    return found | {HEAD: head}


def critic_weights(actor: PolicyActor) -> dict[str, Tensor]:
    """The critic's current weights by Hugging Face name."""
    return by_name(actor, {name: each.detach().clone() for name, each in actor.critic.stage.named_parameters()})
