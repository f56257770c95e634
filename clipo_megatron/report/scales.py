"""Scales and ticks of axes, and numbers, durations and texts formatted for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from unicodedata import category

_FARTHEST = 1e6  # pixels of what is drawn outside the picture
_LARGEST, _SMALLEST = 1e300, 1e-290  # of numbers whose differences and ratios are finite
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """A linear scale from values [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        place = self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)
        return max(-_FARTHEST, min(_FARTHEST, place))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` round numbers within [low, high]."""
    step = _round_step((high - low) / max(about, 1))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [(first + number) * step for number in range(count + 1)]


def reach(values: Sequence[float], *, zero: bool = False, share: bool = False) -> tuple[float, float]:
    """Round limits (low, high) of an axis that shows all values; low < high.

    Args:
        values: finite numbers, or none.
        zero: the axis includes 0.
        share: the limits stay within [0, 1].
    """
    least, most = (0.0, 1.0) if share else (-_LARGEST, _LARGEST)
    shown = [*(max(least, min(most, each)) for each in values), *([0.0] if zero or not values else [])]
    low, high = min(shown), max(shown)
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-5 * largest, _SMALLEST):  # otherwise the labels of ticks would be equal
        room = abs(high) * 0.1 if largest > _SMALLEST else (0.1 if share else 1.0)
        low, high = low - (0 if zero and low == 0 else room), high + room
    for _ in range(2):  # wider limits may need a wider step, and both ends must be ticks
        step = _round_step((high - low) / 5)
        low, high = math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(max(step, 1e-300)))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= step * (1 - 1e-9))


def number(value: float | None, digits: int = 4) -> str:
    """A number with four significant digits: 0.1235, 12.3k, 1.2e-7; a dash for None and non-finite values."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e4:
        for unit, prefix in _PREFIXES:
            if size >= unit:
                return f"{value / unit:.3g}{prefix}".replace("-", "−")
    text = f"{value:.{digits}g}" if size >= 1e-4 or size == 0 else f"{value:.2e}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    """A share in percent: 0.125 is "12.5%"."""
    return f"{100 * value:.{digits}f}%".replace("-", "−")


def tick_text(value: float, spacing: float, *, share: bool = False) -> str:
    """The label of a tick, with as many decimals as distinguish it from its neighbours."""
    if share:
        return percent(value, max(0, 1 - math.floor(math.log10(spacing * 100) + 1e-9) - _is_one(spacing)))
    if value and (abs(value) >= 1e4 or (spacing < 1e-4 and abs(value) < 100 * spacing)):
        return number(value, 3)
    return f"{value:.{max(0, min(8, 1 - math.floor(math.log10(spacing) + 1e-9) - _is_one(spacing)))}f}".replace(
        "-", "−"
    )


def _is_one(spacing: float) -> int:
    """1 where the spacing is 1, 2 or 5 times a power of ten, whose multiples need no further digit; 0 for 2.5."""
    mantissa = spacing / 10.0 ** math.floor(math.log10(spacing) + 1e-9)
    return 0 if abs(mantissa - 2.5) < 1e-6 else 1


def seconds(value: float) -> str:
    """A duration: 48 s, 3 min 10 s, 2 h 05 min."""
    whole = round(value)
    if value < 10:
        return f"{value:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def byte_count(value: float) -> str:
    """An amount of memory in binary units."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1024:.3g} KiB"


def safe(text: object) -> str:
    """Text escaped for HTML and double-quoted attributes; control characters are written as escapes."""
    shown = str(text)
    return escape(shown if shown.isprintable() else "".join(map(_visible, shown)), quote=True)


def _visible(character: str) -> str:
    if character in "\n\t" or character.isprintable() or category(character) == "Zs":  # Zs: spaces
        return character
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
