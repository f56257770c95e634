"""The range of a number, declared beside its field and read by checks, help and error messages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from math import inf, isfinite
from typing import Any

from clipo_megatron.config.errors import ConfigProblem, spell

# What a number may be at most where its field says nothing: beyond these it is a slip, and it overflows somewhere.
LARGEST_WHOLE = 2**31 - 1  # of an int32, in which tokens and lengths are kept
LARGEST = 1e9
LONGEST_S = 2e6  # 23 days; poll(2) counts 2**31 milliseconds
# What a number may be at least that is not 0: below these it is a slip too, and what is divided by it overflows.
SMALLEST = 1e-12
SHORTEST_S = 1e-3
SECONDS = "_s"  # ends the name of a number of seconds


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers between two bounds. Reads "at least 1", "above 0 and at most 1", "from 0 to 1"."""

    least: float = -inf
    most: float = inf
    above: float = -inf
    below: float = inf
    because: str = ""  # why others make no sense, as a clause

    def __contains__(self, number: float) -> bool:
        return (
            (isinstance(number, int) or isfinite(number))
            and self.least <= number <= self.most
            and self.above < number < self.below
        )

    def __str__(self) -> str:
        if isfinite(self.least) and isfinite(self.most):
            return f"from {_spelled(self.least)} to {_spelled(self.most)}"
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {_spelled(bound)}" for word, bound in bounds if isfinite(bound))


def _spelled(bound: float) -> str:
    """A bound with all of its digits where it is a whole number."""
    return f"{bound:.0f}" if bound == round(bound) else f"{bound:g}"


def within(
    default: Any, least: float = -inf, most: float = inf, *, above: float = -inf, below: float = inf, because: str = ""
) -> Any:
    """A dataclass field whose value is a number from `least` to `most`, or null where its type allows that.

    `above` and `below` are bounds that are no values themselves. `because` is added to the error message.
    """
    return field(default=default, metadata={"range": Range(least, most, above, below, because)})


def range_of(declared: Field[Any]) -> Range | None:
    """The range that a field was declared with."""
    return declared.metadata.get("range")


def range_violation(declared: Field[Any], value: Any) -> str | None:
    """What was expected in place of `value`, as "it must be ..."; None if the value is in the field's range.

    Values that are no numbers have no range. A number whose field has no bound must be finite, and no larger than any
    that makes sense.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    bounds = range_of(declared) or Range()
    if value not in bounds:
        expected = str(bounds) or "a finite number"
        return f"it must be {expected}" + (f": {bounds.because}" if bounds.because else "")
    smallest = SHORTEST_S if declared.name.endswith(SECONDS) else SMALLEST
    if 0 < abs(value) < smallest:
        return f"its size must be at least {smallest:g}"
    if isfinite(min(bounds.most, bounds.below)):
        return None
    if declared.name.endswith(SECONDS):
        return None if value <= LONGEST_S else f"it must be at most {LONGEST_S:.0f} s, which are 23 days"
    largest = LARGEST_WHOLE if isinstance(value, int) else LARGEST
    return None if abs(value) <= largest else f"its size must be at most {largest:.0f}"


def range_problems(section: Any, prefix: str = "") -> Iterator[ConfigProblem]:
    """One problem for each number out of its range in a dataclass, in those inside it and in their lists."""
    for each in fields(section):
        key, value = f"{prefix}{each.name}", getattr(section, each.name)
        if is_dataclass(value):
            yield from range_problems(value, f"{key}.")
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from range_problems(entry, f"{key}[{index}].")
                elif reason := range_violation(each, entry):
                    yield ConfigProblem(f"{key}[{index}]", reason, "Correct it", entry)
        elif reason := range_violation(each, value):
            remedy = "or set it to null" if each.default is None else f"the default is {spell(each.default)}"
            yield ConfigProblem(key, reason, f"Correct it{',' if each.default is None else ';'} {remedy}", value)
