"""Which values of a row can be tokenised, compared and written again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST_TEXT = 4_000_000  # characters; a context of a million tokens, which takes some seconds to tokenise
_DEEPEST = 64  # lists and mappings within each other
_SUSPICIOUS = (b"\\ud", b"\\uD")  # how JSON spells halves of characters


def may_be_unfit(line: bytes) -> bool:
    """Whether a line of JSON can hold what `unfit_part` finds; most lines cannot, which saves looking at each value."""
    return any(each in line for each in _SUSPICIOUS) or line.count(b"[") + line.count(b"{") > _DEEPEST


def unfit_part(record: Any) -> tuple[str, str] | None:
    """The field of a record that holds half of a character or nests too deeply, and why it cannot be used."""
    left = [("", record, 0)]
    while left:
        field, value, depth = left.pop()
        if depth > _DEEPEST:
            return field, f"lists and mappings are nested more than {_DEEPEST} deep"
        if isinstance(value, str) and (reason := _why_no_text(value)):
            return field or "(all of it)", reason
        left += [(f"{field}{name}", part, depth + 1) for name, part in _parts(value, bool(field))]
    return None


def why_unfit(value: Any) -> str:
    """Why a text or number of a problem cannot be used; "" if it can."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"a finite number is needed, not {value}"
    if not isinstance(value, str):
        return ""
    if len(value) > LONGEST_TEXT:
        return f"it has {len(value):,} characters, and at most {LONGEST_TEXT:,} are read"
    return _why_no_text(value)


def _why_no_text(text: str) -> str:
    if "\0" in text:
        return "it has a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"it has half of a character, \\u{ord(text[error.start]):04x} at place {error.start}, which is no text"
    return ""


def _parts(value: Any, named: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield f"{'.' if named else ''}{str(name)[:80]!s}".encode(errors="backslashreplace").decode(), part
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield f"[{index}]", part
