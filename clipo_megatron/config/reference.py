"""The settings as a table, read out of the schema itself, so that help and error messages cannot go stale."""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union

from clipo_megatron.config.ranges import Range, range_of
from clipo_megatron.config.schema import RunConfig

MANDATORY = "???"  # OmegaConf's mark of a value that has to be given


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting as the schema declares it. In a list of sections its key reads `data.train[].path`."""

    key: str
    annotation: Any
    default: object  # MANDATORY when it has to be given
    range: Range | None
    owner: type  # the dataclass that it is a field of

    @property
    def comment(self) -> str:
        """What stands behind and above the field in the source, which is read when it is first asked for."""
        name = self.key.rpartition(".")[2]
        for each in filter(is_dataclass, self.owner.__mro__):
            if name in (described := comments(sys.modules[each.__module__])[each.__name__]):
                return described[name]
        return ""

    @property
    def section(self) -> str:
        """The first part of the key; "" for settings of no section."""
        return self.key.partition(".")[0] if "." in self.key else ""

    @property
    def type(self) -> str:
        """In words, with the range: "a whole number, at least 1", "one of token, sequence, geometric"."""
        words = describe(self.annotation)
        if self.range is None:
            return words
        number, comma, null = words.partition(", or null")
        return f"{number}, {self.range}{comma}{null}"

    @property
    def choices(self) -> dict[str, str]:
        """The meaning of each value of a choice, where the schema explains it."""
        inner = choices_by_name(self.annotation) or unwrap_optional(self.annotation)[0]
        if not (isinstance(inner, type) and issubclass(inner, Enum)):
            return {}
        described = comments(sys.modules[inner.__module__])[inner.__name__]
        return {str(each.value): text for each in inner if (text := described.get(each.name))}


@cache
def settings(section: type = RunConfig) -> tuple[Setting, ...]:
    """All settings of a section, a dataclass, in its order; by default those of a run."""
    return tuple(_walk(section, ""))


@cache
def keys() -> tuple[str, ...]:
    """The dotted keys of all settings and sections."""
    found: dict[str, None] = {}
    for setting in settings():
        parts = setting.key.split(".")
        for depth in range(1, len(parts)):
            found[".".join(parts[:depth]).removesuffix("[]")] = None
        found[setting.key] = None
    return tuple(found)


@cache
def hints(section: type) -> Mapping[str, Any]:
    """The types of a section's fields, by field name."""
    return types.MappingProxyType(typing.get_type_hints(section))


def unwrap_optional(annotation: Any) -> tuple[Any, bool]:
    """`Optional[X]` -> (X, True); anything else -> (itself, False)."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        return inner[0], True
    return annotation, False


def list_section(annotation: Any) -> type | None:
    """The class X of a `list[X]` of sections; None for other annotations."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list and is_dataclass(arguments[0]):
        return arguments[0]
    return None


def choices_by_name(annotation: Any) -> type[Enum] | None:
    """The enum E of a `dict[str, E]`; None for other annotations."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and isinstance(arguments[1], type) and issubclass(arguments[1], Enum):
        return arguments[1]
    return None


def describe(annotation: Any) -> str:
    """An annotation in words, such as "a whole number, or null"."""
    inner, optional = unwrap_optional(annotation)
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "anything"}
    if inner in plain:
        words = plain[inner]
    elif isinstance(inner, type) and issubclass(inner, Enum):
        words = "one of " + ", ".join(str(member.value) for member in inner)
    elif list_section(inner):
        words = "a list of sections"
    elif is_dataclass(inner):
        words = "a section"
    elif typing.get_origin(inner) is list:
        words = f"a list, each entry {describe(typing.get_args(inner)[0])}"
    elif typing.get_origin(inner) is dict:
        value = typing.get_args(inner)[1]
        words = "a mapping" if value is Any else f"a mapping to {describe(value)}"
    else:
        words = str(inner)
    return f"{words}, or null" if optional else words


def _walk(section: type, prefix: str) -> Iterator[Setting]:
    for item in fields(section):
        annotation, key = hints(section)[item.name], f"{prefix}{item.name}"
        if is_dataclass(annotation):
            yield from _walk(annotation, f"{key}.")
        elif inner := list_section(annotation):
            yield from _walk(inner, f"{key}[].")
        else:
            default = item.default_factory() if item.default is MISSING else item.default
            yield Setting(key, annotation, default, range_of(item), section)


@cache
def comments(module: types.ModuleType) -> dict[str, dict[str, str]]:
    """The comment of each field of a module's classes, by class and field name: behind the field, or right above it."""
    source = inspect.getsource(module)
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines = alone if token.line.lstrip().startswith("#") else behind
            lines[token.start[0]] = token.string.lstrip("# ").rstrip()

    def comment(item: ast.stmt) -> str:
        first = item.lineno
        while first - 1 in alone:
            first -= 1
        above = [alone[line] for line in range(first, item.lineno)]
        return " ".join([*above, *([behind[item.end_lineno]] if item.end_lineno in behind else [])])

    return {
        node.name: {name: comment(item) for item in node.body if (name := _field_name(item))}
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _field_name(item: ast.stmt) -> str:
    """The name that a statement of a class's body gives a value to, as a field or a member; "" for other statements."""
    target = getattr(item, "target", None) or next(iter(getattr(item, "targets", ())), None)
    return target.id if isinstance(target, ast.Name) else ""
