"""The facts of a model's architecture, read from config.json, in Megatron's terms but without Megatron."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.weights.errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Positions divided by a factor (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the MLP, in every layer but the `dense_layers`."""

    count: int
    per_token: int  # experts that a token is sent to
    ffn_hidden_size: int  # of one expert
    renormalised: bool  # whether the chosen experts' probabilities are made to sum to 1
    dense_layers: frozenset[int] = frozenset()  # with a plain MLP


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SiLU-gated MLPs."""

    family: str  # model_type of config.json
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # num_heads * head_dim need not be hidden_size
    vocab_size: int  # rows of the embedding, unpadded
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | LinearRope | None
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # tokens that a token attends to, itself among them; None: all before it
    experts: Experts | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def query_size(self) -> int:
        """Rows of q_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_kv_heads * self.head_dim


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Angular frequency of each rotary pair in radians a token, [head_dim / 2] float32.

    megatron-core fixes llama3's low, high and original length at 1, 4 and 8192; writing this over the `inv_freq` of its
    rotary embedding is right for every value. Source: the scaling of Llama 3.1, also `rope_type="llama3"` of
    transformers.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: the path must be a Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a JSON {type(config).__name__}, not an object")
    return config


def decoder_spec(config: Mapping[str, Any], *, qkv_bias: bool = False, qk_norm: bool = False) -> ModelSpec:
    """The fields that decoders of the Llama line share; a family adds its own checks around it.

    Raises:
        UnsupportedModel: an activation or a rotary embedding without an equal in Megatron, or a field is missing.
    """
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel("hidden_act", activation, "only the SiLU-gated MLP is implemented")
    refuse_if_set(config, "quantization_config", "the policy trains unquantised weights")
    heads, hidden = _required(config, "num_attention_heads"), _required(config, "hidden_size")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UnsupportedModel("num_key_value_heads", kv_heads, f"it must divide num_attention_heads={heads}")
    theta, scaling = _rope(config)
    return ModelSpec(
        family=str(config.get("model_type")),
        num_layers=_required(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_required(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=_required(config, "vocab_size"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=int(config.get("max_position_embeddings", 2048)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def refuse_if_set(config: Mapping[str, Any], field: str, reason: str) -> None:
    """Raise UnsupportedModel when a flag of config.json is true (absent counts as false)."""
    if config.get(field):
        raise UnsupportedModel(field, config[field], reason)


def _required(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(field, value, "a positive whole number is needed")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    parameters = config.get(field) or {}
    old, new = config.get("rope_theta"), parameters.get("rope_theta")
    if old is not None and new is not None and old != new:
        raise UnsupportedModel("rope_theta", old, f"{field} says {new!r}; remove one of the two")
    theta = next((value for value in (new, old) if value is not None), 10000.0)
    for holder in (config, parameters):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnsupportedModel(
                "partial_rotary_factor", holder["partial_rotary_factor"], "only whole heads are rotated"
            )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UnsupportedModel(f"{field}.rope_type", kind, "only 'default' and 'llama3' are implemented")
    missing = [
        name
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if parameters.get(name) is None
    ]
    if missing:
        raise UnsupportedModel(f"{field}.{missing[0]}", None, "rope_type 'llama3' needs it")
    return float(theta), Llama3Rope(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_positions=int(parameters["original_max_position_embeddings"]),
    )
