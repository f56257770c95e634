"""Megatron's own configurations, made of what this package decides and of the section `megatron`."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any, TypeVar

import torch

from clipo_megatron.config.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


Section = TypeVar("Section")


def configured(
    section: type[Section], given: Mapping[str, Any], *, owned: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Section:
    """Make one of Megatron's configurations.

    Args:
        section: its class, a dataclass.
        given: the section `megatron`; fields that other classes have are left out.
        owned: fields that the section must not set.
        defaults: fields that it may.

    Raises:
        ConfigError: Megatron refuses the fields that were given.
    """
    own = {each.name for each in fields(section)}  # type: ignore[arg-type]
    chosen = {name: _typed(_hints(section)[name], value) for name, value in given.items() if name in own}
    try:
        return section(**{**defaults, **chosen, **owned})
    except (ValueError, AssertionError, RuntimeError) as error:
        if not chosen:
            raise
        named, reason = ", ".join(f"{name} = {given[name]}" for name in chosen), str(error).rstrip(".")
        raise ConfigError(f"megatron: Megatron refuses {named}: {reason}. Correct or remove them.") from error


@cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _typed(annotation: Any, value: Any) -> Any:
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Union else (annotation,)
    if torch.dtype in kinds and isinstance(value, str):
        return _DTYPES[value]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum) and value in kind.__members__:
            return kind[value]
        if typing.get_origin(kind) is tuple and isinstance(value, list):
            return tuple(value)
    return value
