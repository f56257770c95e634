"""Two configurations of a run compared: which settings differ, by dotted key. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

from clipo_megatron.config import reference, renamed
from clipo_megatron.config.schema import RunConfig

ABSENT = "(not set)"  # the value of a setting in a configuration that does not have it


class ChangedSetting(NamedTuple):
    """A setting with its value before and now."""

    key: str
    before: Any
    now: Any


def plain(config: RunConfig) -> dict[str, Any]:
    """A configuration as nested dictionaries, lists, numbers and texts, as a run's config.json has it."""
    return _plain(asdict(config))


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> list[ChangedSetting]:
    """The settings that differ, in the order of `now`.

    Settings that an older version did not know count as having had their default, and those that this version does not
    know are left out.

    Args:
        before: a nested configuration, of any version.
        now: a nested configuration of this version.
        ignore: keys that are not compared, and sections with a dot behind.
    """
    old, new = _flat(_with_new_names(before)), _flat(now)
    defaults, sections = _defaults(), set(now)
    found = []
    for key in [*new, *(key for key in old if key not in new and key.partition(".")[0] in sections)]:
        if any(key == each or (each.endswith(".") and key.startswith(each)) for each in ignore):
            continue
        if key not in old and new[key] in ([], {}):
            continue  # where there were entries, each is listed by itself
        first, second = old.get(key, defaults.get(key, ABSENT)), new.get(key, ABSENT)
        if first != second and (key in new or _is_entry(key)):
            found.append(ChangedSetting(key, first, second))
    return found


def _is_entry(key: str) -> bool:
    """Whether a key is that of an entry of a list or of a mapping in the schema, such as sglang.dtype."""
    return "[" in key or any(key.startswith(f"{mapping}.") for mapping in _mappings())


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; entries of lists of sections have a number, as in data.train[0].path."""
    if isinstance(value, Mapping) and value:
        parts = [(f"{prefix}.{key}" if prefix else str(key), each) for key, each in value.items()]
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        parts = [(f"{prefix}[{index}]", each) for index, each in enumerate(value)]
    else:
        return {prefix: value} if prefix else {}
    return {key: leaf for name, each in parts for key, leaf in _flat(each, name).items()}


def _with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    copy = {name: dict(section) if isinstance(section, Mapping) else section for name, section in settings.items()}
    renamed.rename(copy)
    return copy


@cache
def _defaults() -> dict[str, Any]:
    """The default of each setting that stands in no list."""
    return {each.key: _plain(each.default) for each in reference.settings() if "[]" not in each.key}


@cache
def _mappings() -> tuple[str, ...]:
    return tuple(each.key for each in reference.settings() if each.type.startswith("a mapping"))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
