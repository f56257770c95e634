"""`Family`: all that this project knows about the models of one `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clipo_megatron.weights.families.decoder import decoder_rules
from clipo_megatron.weights.mapping import MappingEntry, Rule
from clipo_megatron.weights.server_layout import ServerTensor
from clipo_megatron.weights.spec import ModelSpec, decoder_spec

# Reasons that several families refuse a field for.
BIAS_ON_O_PROJ = "it puts a bias on o_proj, which Megatron cannot represent"
NO_MLP_BIAS = "Megatron's gated MLP is built without biases"
WHOLE_SEQUENCE = "it lets layers attend to a window; here every layer of this family attends to the whole sequence"

# transformers' values for fields that config.json leaves out: what most families share, and what those of Qwen do.
DECODER = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
QWEN = DECODER | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models, which the module named after its `model_type` declares as `FAMILY`.

    `spec` and `rules` are those of a plain Llama-like decoder unless the family says otherwise. `server_layout` says
    how SGLang and vLLM hold the tensor of a mapping entry; None while nobody has looked: such a family can be trained
    with the local engine, and its weight sync cannot be proven.
    """

    architecture: str  # the class in transformers, which "architectures" of config.json names
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' values for fields that are left out
    refused: Mapping[str, str] = field(default_factory=dict)  # fields that must not be set, each with the reason
    spec: Callable[[Mapping[str, Any]], ModelSpec] = decoder_spec  # of config.json, with the defaults filled in
    rules: Callable[[ModelSpec], list[Rule]] = decoder_rules
    server_layout: Callable[[MappingEntry, int], ServerTensor] | None = None
    sglang_ignores_window: bool = False  # whether SGLang attends to the whole sequence in spite of sliding_window
