"""Types of numbers on the command line. A number out of range is refused with the numbers that are taken."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import isfinite

from clipo_megatron.config.errors import shortened
from clipo_megatron.config.ranges import LARGEST, LARGEST_WHOLE


def whole(least: int = 1, most: int = LARGEST_WHOLE) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:  # of several thousand digits too
            number = least - 1
        if not least <= number <= most:
            limit = f"from {least} on" if most == LARGEST_WHOLE else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{_cut(text)} is no whole number {limit}")
        return number

    return read


def positive(text: str) -> float:
    """A type for argparse: finite numbers above 0."""
    if not 0 < (number := _finite(text)) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{_cut(text)} is no number above 0, such as 2 or 0.5")
    return number


def hours(text: str) -> float:
    """A type for argparse: hours to wait, from 0 on."""
    if not 0 <= (number := _finite(text)) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{_cut(text)} is no number of hours from 0 on, such as 0 or 12")
    return number


def whole_numbers(text: str, least: int = 1) -> tuple[int, ...]:
    """The whole numbers of an option such as "8,16".

    Raises:
        argparse.ArgumentTypeError: something else, or a number below `least`.
    """
    return tuple(whole(least)(each.strip()) for each in text.split(",") if each.strip())


def _finite(text: str) -> float:
    """The number that a text stands for; -1 for what is none, and for those that are not finite."""
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if isfinite(number) else -1.0


def _cut(text: str) -> str:
    return repr(shortened(text, 40))
