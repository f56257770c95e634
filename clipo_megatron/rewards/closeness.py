"""When two values are equal: exactly where both are rational, relative to their size elsewhere.

3 and 2.99999999                 different: an integer is that integer
1/3 and 0.333333                 equal: a decimal of six or more digits that agrees to its last place
2**-80 and 2**-81, 1e-8 and 0    different: no absolute tolerance
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from clipo_megatron.rewards import evaluation, formula
from clipo_megatron.rewards.evaluation import TooLarge

FEWEST_DIGITS = 6  # of a decimal that stands for a value it is not equal to
_RELATIVE = 1e-30  # of two values of 60 digits
_POINTS = 4
_DECIMAL = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>[0-9]*)\.(?P<places>[0-9]+)"
    r"(?:\s*(?:[eE]|(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?)\s*(?P<power>[-+]?[0-9]{1,4})\}?)?"
)
_NOT_DECIMAL = re.compile(r"\\frac|/|\\sqrt|\\div")
_DECIMAL_INSIDE = re.compile(r"[0-9]*\.[0-9]+")


@dataclass(frozen=True)
class _Decimal:
    value: Fraction
    last_place: Fraction
    digits: int  # significant ones


def equal(answer: str, gold: str) -> bool | None:
    """Whether two formulas have the same value; None where one of them is not read.

    Variables take the same values on both sides.
    """
    try:
        mine, theirs = formula.read(answer), formula.read(gold)
    except formula.Unreadable:
        return None
    decimals = _decimal(answer), _decimal(gold)
    tolerance = _tolerance(answer, gold)
    bases = (0, 10) if formula.uses(mine, "log") or formula.uses(theirs, "log") else (0,)
    variables = formula.symbols(mine) | formula.symbols(theirs)
    if not variables:
        return any(_equal_at(mine, theirs, 0, base, decimals, tolerance) is True for base in bases)
    return any(_equal_at_points(mine, theirs, base, tolerance) for base in bases)


def number(text: str) -> Fraction | None:
    """The rational value of a formula without variables; None where it has none or is not read."""
    try:
        found = evaluation.value(formula.read(text)) if not formula.symbols(formula.read(text)) else None
    except (formula.Unreadable, TooLarge):
        return None
    return found if isinstance(found, Fraction) else None


def is_constant(text: str) -> bool:
    """Whether `text` is a formula without variables."""
    try:
        return not formula.symbols(formula.read(text))
    except formula.Unreadable:
        return False


def approximate(text: str) -> complex | None:
    """The value of a formula without variables in double precision; None where it has none."""
    try:
        node = formula.read(text)
        return None if formula.symbols(node) else complex(evaluation.value(node))
    except (formula.Unreadable, TooLarge, OverflowError, ValueError):
        return None


def proportional(answer: tuple[str, str], gold: tuple[str, str]) -> float | None:
    """The constant c with left - right of `answer` = c times that of `gold`; None where there is none.

    Two equations, or two inequalities with a positive c, say the same then.
    """
    try:
        sides = [(formula.read(left), formula.read(right)) for left, right in (answer, gold)]
    except formula.Unreadable:
        return None
    ratios = []
    for point in range(_POINTS):
        try:
            mine, theirs = (
                evaluation.value(("-", left, right), point=point, digits=evaluation.DIGITS) for left, right in sides
            )
            ratios.append(complex(mine / theirs if isinstance(mine, type(theirs)) else _wide(mine) / _wide(theirs)))
        except (TooLarge, ZeroDivisionError, OverflowError, TypeError):
            continue
    if len(ratios) < 2 or any(abs(ratio - ratios[0]) > 1e-12 * abs(ratios[0]) for ratio in ratios):
        return None
    return ratios[0].real if ratios[0] != 0 and ratios[0].imag == 0 else None


def _wide(value: Any) -> Any:
    mp = evaluation.context(evaluation.DIGITS)
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _equal_at_points(mine: Any, theirs: Any, base: int, tolerance: float) -> bool:
    verdicts = [_equal_at(mine, theirs, point, base, (None, None), tolerance) for point in range(_POINTS)]
    return verdicts.count(None) <= _POINTS - 2 and False not in verdicts


def _equal_at(
    mine: Any, theirs: Any, point: int, base: int, decimals: tuple[_Decimal | None, _Decimal | None], tolerance: float
) -> bool | None:
    """Whether two formulas have the same value at a point; None where neither has one there."""
    values = []
    for node in (mine, theirs):
        try:
            values.append(evaluation.value(node, point=point, log_base=base))
        except TooLarge:
            values.append(None)
    if values[0] is None or values[1] is None:
        return None if values == [None, None] else False
    return _same(values[0], values[1], decimals, tolerance, ("-", mine, theirs), point, base)


def _same(
    answer: Any,
    gold: Any,
    decimals: tuple[_Decimal | None, _Decimal | None],
    tolerance: float,
    difference: Any,
    point: int,
    base: int,
) -> bool:
    exact = isinstance(answer, Fraction), isinstance(gold, Fraction)
    if all(exact):
        if answer == gold:
            return True
        if tolerance and difference_is_within(answer, gold, tolerance):
            return True
        if answer.denominator == 1 or gold.denominator == 1:
            return False
        return _stands_for(decimals[0], gold) or _stands_for(decimals[1], answer)
    if _stands_for(decimals[0], gold) or _stands_for(decimals[1], answer):
        return True
    answer, gold = _wide(answer), _wide(gold)
    if difference_is_within(answer, gold, max(_RELATIVE, tolerance)):
        return True
    if answer and gold and abs(answer) < 1e20 * abs(gold) and abs(gold) < 1e20 * abs(answer):
        return False
    # One of them is zero, or nearly: a true zero shrinks with more digits, and a small number stays.
    try:
        found = [
            abs(_wide(evaluation.value(difference, point=point, digits=digits, log_base=base)))
            for digits in (
                evaluation.DIGITS,
                evaluation.MORE_DIGITS,
            )
        ]
    except TooLarge:
        return False
    return bool(found[1] == 0 or found[1] < found[0] * 1e-20)


def difference_is_within(answer: Any, gold: Any, tolerance: float) -> bool:
    """Whether two values differ by at most `tolerance` times the larger of them."""
    if isinstance(answer, Fraction) and isinstance(gold, Fraction):
        return abs(answer - gold) <= Fraction(tolerance) * max(abs(answer), abs(gold))
    return bool(abs(answer - gold) <= tolerance * max(abs(answer), abs(gold)))


def _stands_for(decimal: _Decimal | None, value: Any) -> bool:
    """Whether a decimal of six digits or more agrees with `value` to its last place, rounded or cut."""
    if decimal is None or decimal.digits < FEWEST_DIGITS:
        return False
    if isinstance(value, Fraction):
        return abs(decimal.value - value) < decimal.last_place
    if getattr(value, "imag", 0) != 0:
        return False
    return bool(abs(_wide(decimal.value) - value) < _wide(decimal.last_place))


def _decimal(text: str) -> _Decimal | None:
    """The decimal that `text` writes, if it is nothing else: 0.0123, -6.02\\times10^{23}."""
    found = _DECIMAL.fullmatch(text.strip().replace(" ", ""))
    if found is None or len(text) > 200:
        return None
    places = found["places"].rstrip("0")
    if not places:
        return None
    power = Fraction(10) ** int(found["power"] or 0)
    digits = (found["whole"] + places).lstrip("0")
    value = Fraction(f"{found['sign']}{found['whole'] or '0'}.{places}") * power
    return _Decimal(value, power / 10 ** len(places), len(digits))


def _tolerance(answer: str, gold: str) -> float:
    r"""Relative tolerance where one formula has long decimals in place of the other's fractions: 0.333333\pi."""
    for text, other in ((answer, gold), (gold, answer)):
        numerals = _DECIMAL_INSIDE.findall(text)
        if numerals and _decimal(text) is None and _NOT_DECIMAL.search(other) and not _DECIMAL_INSIDE.search(other):
            digits = min(len(numeral.replace(".", "").strip("0")) for numeral in numerals)
            if digits >= FEWEST_DIGITS:
                return 10.0 ** (1 - digits)
    return 0.0
