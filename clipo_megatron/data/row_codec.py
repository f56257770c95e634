"""Rows as bytes and back, exactly: what is read is equal in value and type to what was written.

A row is written as JSON where JSON says the same, and as a Python literal where values are tuples or sets, as some
generators have them. A literal is read by `ast.literal_eval`, which runs nothing. Dates, decimals and other objects
that neither can say are left out, and the reader is told to take the row from its source again.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

_JSON, _LITERAL, _ELSEWHERE = b"J", b"L", b"E"
_LONGEST_BITS = 14_000  # of an integer: Python reads no number of more than 4,300 digits from text
_DEEPEST = 50  # levels of a value; deeper ones are taken from the source


def encode(facts: Sequence[Any], extra: Mapping[str, Any]) -> bytes:
    """The bytes of a row.

    Args:
        facts: values that JSON carries, apart from lists and tuples, which are read as lists.
        extra: the row's further fields.
    """
    plain = extra if type(extra) is dict else dict(extra)
    if _is_json(plain):
        return _JSON + _dumps([*facts, plain])
    if literal := _literal(plain):
        return _LITERAL + _dumps([*facts, literal])
    return _ELSEWHERE + _dumps([*facts, None])


def decode(data: bytes) -> list[Any]:
    """The facts that were encoded, and behind them the further fields, or None where they are elsewhere."""
    *facts, extra = json.loads(data[1:])
    return [*facts, ast.literal_eval(extra) if data[:1] == _LITERAL else extra]


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _is_json(value: Any, depth: int = 0) -> bool:
    """Whether JSON gives a value back as it is; subclasses of its types, such as enums, it does not."""
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or value is None:
        return kind is not int or value.bit_length() < _LONGEST_BITS
    if depth >= _DEEPEST:
        return False
    if kind is list:
        return all(_is_json(each, depth + 1) for each in value)
    return kind is dict and all(type(key) is str and _is_json(each, depth + 1) for key, each in value.items())


def _literal(value: Any) -> str:
    """A Python literal that gives the value back as it is; "" if there is none."""
    try:
        text = repr(value)
        return text if _same(ast.literal_eval(text), value) else ""
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ""


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of equal types all through."""
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return list(value) == list(other) and all(_same(value[key], other[key]) for key in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    return bool(value == other)
