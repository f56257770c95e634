"""The range of a number, declared beside its field and read by checks, `--help` and docs alike. Imports no torch."""

from __future__ import annotations

from dataclasses import Field, field
from math import inf, isfinite
from typing import Any


def within(default: Any, least: float, most: float = inf) -> Any:
    """A dataclass field whose value is a number from `least` to `most`, or null where its type allows that."""
    return field(default=default, metadata={"least": least, "most": most})


def range_violation(declared: Field[Any], value: Any) -> str | None:
    """What was expected in place of `value`, as "it must be ..."; None if the value is in the field's range.

    Values that are no numbers have no range. A number without a declared range must be finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    least, most = declared.metadata.get("least", -inf), declared.metadata.get("most", inf)
    if isfinite(value) and least <= value <= most:
        return None
    if not declared.metadata:
        return "it must be a finite number"
    return f"it must be from {least:g} to {most:g}" if most < inf else f"it must be at least {least:g}"
