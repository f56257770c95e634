"""The fields of a model's config.json that are read, each with its type and range. Imports no torch.

A config.json may come from anybody, and may hold anything under any name. What passes here can be computed with: sizes
are whole numbers of a magnitude that models have, so that nothing is enumerated for hours or allocated without end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clipo_megatron.weights.errors import UnsupportedModel

DTYPES = ("float32", "bfloat16", "float16", "float64")
_MOST_EXPERTS = 200_000  # of all layers together; the largest models known have a tenth of them


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a field may hold: a test, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and value == value


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _count(most: int) -> _Kind:
    return _Kind(lambda value: _is_whole(value) and 1 <= value <= most, f"a positive whole number up to {most:,}")


def _or_null(kind: _Kind) -> _Kind:
    return _Kind(lambda value: value is None or kind.holds(value), f"{kind.words} or null")


def _list_of(kind: _Kind) -> _Kind:
    return _Kind(lambda value: isinstance(value, list) and all(map(kind.holds, value)), f"a list of {kind.words}")


_TEXT = _Kind(lambda value: isinstance(value, str), "text")
_TRUTH = _or_null(_Kind(lambda value: isinstance(value, bool), "true or false"))
_TOKEN = _Kind(_is_whole, "the number of a token")
_TOKENS = _or_null(
    _Kind(lambda value: _TOKEN.holds(value) or _list_of(_TOKEN).holds(value), "a token id or a list of them")
)
_MAPPING = _or_null(_Kind(lambda value: isinstance(value, Mapping), "a mapping"))
_POSITIVE = _Kind(lambda value: _is_number(value) and value > 0, "a positive number")
_LAYER = _Kind(lambda value: _is_whole(value) and value >= 0, "the number of a layer")
_DTYPE = _Kind(
    lambda value: isinstance(value, str) and value.removeprefix("torch.") in DTYPES, f"one of {', '.join(DTYPES)}"
)
_WIDTH, _HEADS, _LAYERS, _EXPERTS = _count(2**22), _count(2**14), _count(4096), _count(2**14)

FIELDS: dict[str, _Kind] = {
    "architectures": _or_null(_list_of(_TEXT)),
    "attention_bias": _TRUTH,
    "bos_token_id": _TOKENS,
    "decoder_sparse_step": _count(4096),
    "dtype": _or_null(_DTYPE),
    "eos_token_id": _TOKENS,
    "head_dim": _or_null(_count(2**16)),
    "hidden_act": _TEXT,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "layer_types": _or_null(_list_of(_TEXT)),
    "max_position_embeddings": _count(2**40),
    "mlp_bias": _TRUTH,
    "mlp_only_layers": _or_null(_list_of(_LAYER)),
    "model_type": _TEXT,
    "moe_intermediate_size": _WIDTH,
    "norm_topk_prob": _TRUTH,
    "num_attention_heads": _HEADS,
    "num_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": _or_null(_HEADS),
    "num_local_experts": _EXPERTS,
    "original_max_position_embeddings": _or_null(_count(2**40)),
    "pad_token_id": _TOKENS,
    "partial_rotary_factor": _or_null(_POSITIVE),
    "rms_norm_eps": _Kind(lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to 1"),
    "rope_parameters": _MAPPING,
    "rope_scaling": _MAPPING,
    "rope_theta": _or_null(_POSITIVE),
    "sliding_window": _or_null(_count(2**40)),
    "tie_word_embeddings": _TRUTH,
    "torch_dtype": _or_null(_DTYPE),
    "use_sliding_window": _TRUTH,
    "vocab_size": _count(2**26),
}
_ROPE_FIELDS = {
    "factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _count(2**40),
    "partial_rotary_factor": _POSITIVE,
    "rope_theta": _POSITIVE,
    "rope_type": _TEXT,
    "type": _TEXT,
}


def check_fields(config: Mapping[str, Any]) -> None:
    """Check the type and range of every field that is there.

    Raises:
        UnsupportedModel: names the field, its value and what it may hold.
    """
    for name, kind in FIELDS.items():
        if name in config and not kind.holds(config[name]):
            raise UnsupportedModel(name, config[name], f"{kind.words} is needed")
    for field in ("rope_scaling", "rope_parameters"):
        for name, value in (config.get(field) or {}).items():
            kind = _ROPE_FIELDS.get(name)
            if kind is not None and value is not None and not kind.holds(value):
                raise UnsupportedModel(f"{field}.{name}", value, f"{kind.words} is needed")
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    if experts * config.get("num_hidden_layers", 1) > _MOST_EXPERTS:
        raise UnsupportedModel("num_experts", experts, f"all layers together have at most {_MOST_EXPERTS:,} here")
