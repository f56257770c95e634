"""The families of models that can be trained: a module and a line each.

docs/families.md shows how a family is added. Importing this package does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from clipo_megatron.weights.config_fields import check_fields
from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families.family import Family
from clipo_megatron.weights.mapping import WHOLE, Coordinates, MappingEntry, PipelineStage, bind
from clipo_megatron.weights.server_layout import ServerTensor, tied_output_layer
from clipo_megatron.weights.spec import ModelSpec

# By `model_type` of config.json, which is the module's name.
FAMILIES: dict[str, Family] = {
    model_type: import_module(f"{__name__}.{model_type}").FAMILY
    for model_type in (
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    )
}

# Families that were examined and cannot be represented, with what megatron-core 0.16.1 or the policy lacks.
REFUSED_FAMILIES = {
    "gemma2": "it caps logits and attention scores with tanh and has norms after attention and MLP too; megatron-core "
    "has neither, and a policy without them would be another model",
    "granite": "it multiplies embeddings, residuals, attention and logits by factors that megatron-core does not have",
    "smollm3": "some of its layers have no rotary positions; here all layers rotate alike",
}


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read the facts of an architecture from the contents of config.json.

    Raises:
        UnsupportedModel: the family is unknown, a field has a wrong type, or asks for what Megatron would compute
            differently.
    """
    name = config.get("model_type")
    if name is not None:
        check_fields({"model_type": name})
    if name not in FAMILIES:
        reason = f"known families are {', '.join(sorted(FAMILIES))}"
        if name in REFUSED_FAMILIES:
            reason = f"{REFUSED_FAMILIES[name]}; {reason}"
        raise UnsupportedModel("model_type", name, reason)
    family = FAMILIES[name]
    known = {**family.defaults, **config}
    check_fields(known)
    for field, reason in family.refused.items():
        if known.get(field):
            raise UnsupportedModel(field, known[field], reason)
    return family.spec(known)


def entries(spec: ModelSpec, stage: PipelineStage, at: Coordinates = WHOLE) -> tuple[MappingEntry, ...]:
    """List the parameters of one model chunk on one rank, in model order, each with the tensors that fill it."""
    return bind(FAMILIES[spec.family].rules(spec), stage, at)


def server_tensors(spec: ModelSpec, *, mlp_multiple: int = 1) -> list[ServerTensor]:
    """List the tensors that a rollout server of this model holds, without its experts.

    Servers stack a layer's experts into two tensors, and each of the trainer's ranks sends some of them, so no rank
    has all that such a tensor is made of: the proof of a weight sync names them as unproven.

    Args:
        spec: the architecture of the model.
        mlp_multiple: the server pads each rank's share of the MLP's inner features with zeros to a multiple of this.

    Raises:
        UnsupportedModel: nobody has declared how servers hold this family.
    """
    layout = FAMILIES[spec.family].server_layout
    if layout is None:
        raise UnsupportedModel("model_type", spec.family, "how servers hold its tensors is not declared")
    whole = entries(spec, PipelineStage(0, spec.num_layers, first=True, last=True))
    held = [layout(entry, mlp_multiple) for entry in whole if not entry.experts]
    return held + ([tied_output_layer()] if spec.tied_embeddings else [])
