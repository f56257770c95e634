"""The rotary positions in config.json: `rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipo_megatron.weights.errors import UnsupportedModel


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


ORIGINAL = "original_max_position_embeddings"
# The fields that each type requires.
_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
}
_EVERYWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL)
_REASONS = {
    "dynamic": "its frequencies change with the length of each sequence",
    "longrope": "its frequencies change with the length of each sequence",
    "su": "its frequencies change with the length of each sequence",
    "yarn": "it scales attention too, which megatron-core 0.16.1 has no setting for",
}


def read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3Rope | LinearRope | None]:
    """Return theta and the scaling.

    Raises:
        UnsupportedModel: a type or field would be computed differently, or two fields disagree.
    """
    field, parameters = _parameters(config)
    theta = _theta(config, field, parameters)
    for holder, name in ((config, "partial_rotary_factor"), (parameters, f"{field}.partial_rotary_factor")):
        if (share := holder.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise UnsupportedModel(name, share, "only whole heads are rotated")
    rope_type = _rope_type(parameters)
    if rope_type not in _FIELDS:
        reason = _REASONS.get(str(rope_type), f"known types are {', '.join(sorted(_FIELDS))}")
        raise UnsupportedModel(f"{field}.rope_type", rope_type, reason)
    for name, value in parameters.items():
        if value is not None and name not in (*_EVERYWHERE, *_FIELDS[rope_type]):
            raise UnsupportedModel(f"{field}.{name}", value, f"rope_type {rope_type!r} has no such field")
    for name in _FIELDS[rope_type]:
        if not isinstance(value := parameters.get(name), int | float) or value <= 0:
            raise UnsupportedModel(f"{field}.{name}", value, f"rope_type {rope_type!r} needs it, positive")
    if rope_type == "default":
        return theta, None
    factor = float(parameters["factor"])
    if rope_type == "linear":
        return theta, LinearRope(factor)
    original = int(parameters[ORIGINAL])
    if config.get(ORIGINAL) not in (None, original):
        raise UnsupportedModel(ORIGINAL, config[ORIGINAL], f"{field} says {original!r}; remove one of the two")
    return theta, Llama3Rope(
        factor=factor,
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_positions=original,
    )


def _parameters(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the field that holds the parameters, and its contents."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for field, parameters in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
            raise UnsupportedModel(field, parameters, "all layers rotate alike, by one set of parameters")
    if new and old:
        both = [name for name in new.keys() & old.keys() if name != "type" and new[name] != old[name]]
        if both or _rope_type(new) != _rope_type(old):
            raise UnsupportedModel("rope_scaling", old, f"rope_parameters says {new!r}; remove one of the two")
    return ("rope_parameters", new) if new else ("rope_scaling", old)


def _rope_type(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type", parameters.get("type", "default"))


def _theta(config: Mapping[str, Any], field: str, parameters: Mapping[str, Any]) -> float:
    old, new = config.get("rope_theta"), parameters.get("rope_theta")
    if old is not None and new is not None and old != new:
        raise UnsupportedModel("rope_theta", old, f"{field} says {new!r}; remove one of the two")
    return float(next((value for value in (new, old) if value is not None), 10000.0))
