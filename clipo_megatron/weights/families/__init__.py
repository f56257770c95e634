"""Model families: one module each, with `spec(config)` and `rules(spec)`.

To add one, write a module with these two functions (start from `decoder.decoder_rules`, replace the rows that differ,
refuse every field of config.json that would change the mathematics) and list it in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families import llama, mistral, phi3, qwen2, qwen3, qwen3_moe
from clipo_megatron.weights.mapping import WHOLE, Coordinates, MappingEntry, PipelineStage, Rule, bind
from clipo_megatron.weights.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """How to read a config.json of this `model_type`, and where its tensors go."""

    spec: Callable[[Mapping[str, Any]], ModelSpec]
    rules: Callable[[ModelSpec], list[Rule]]


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.spec, llama.rules),
    "mistral": Family(mistral.spec, mistral.rules),
    "phi3": Family(phi3.spec, phi3.rules),
    "qwen2": Family(qwen2.spec, qwen2.rules),
    "qwen3": Family(qwen3.spec, qwen3.rules),
    "qwen3_moe": Family(qwen3_moe.spec, qwen3_moe.rules),
}

# Families that were looked at, and what of them Megatron (0.16.1) or the actor cannot compute.
UNREPRESENTED = {
    "gemma2": "it caps logits and attention scores with tanh and has norms after attention and MLP too; megatron-core "
    "has neither, and a policy without them would be another model",
    "granite": "it multiplies embeddings, residuals, attention and logits by factors that megatron-core does not have",
    "smollm3": "some of its layers have no rotary positions; here all layers rotate alike",
}


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Architecture facts from the contents of config.json.

    Raises:
        UnsupportedModel: the family is unknown, or a field asks for what Megatron would compute differently.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        reason = f"known families are {', '.join(sorted(FAMILIES))}"
        if name in UNREPRESENTED:
            reason = f"{UNREPRESENTED[name]}; {reason}"
        raise UnsupportedModel("model_type", name, reason)
    return FAMILIES[name].spec(config)


def entries(spec: ModelSpec, stage: PipelineStage, at: Coordinates = WHOLE) -> tuple[MappingEntry, ...]:
    """The parameters of one model chunk on one rank and the tensors that fill them, in model order."""
    return bind(FAMILIES[spec.family].rules(spec), stage, at)
