r"""The value of a formula: exact where it is rational, to many digits elsewhere.

    \frac{1}{2^{81}}     Fraction(1, 2**81)
    2\sqrt{3}            a real number of 60 digits
    (x+1)^2              a value for each point, where x takes some value

Two formulas that agree wherever their variables are tried are equal: that proves polynomials and fractions of them up
to a vanishing chance, and never takes long, which is why nothing is simplified by rules. Powers are evaluated up to a
size that no person's answer has; beyond it a formula has no value (`TooLarge`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from math import comb, factorial, isqrt, prod
from typing import Any

from clipo_megatron.rewards.formula import Node

DIGITS = 60
MORE_DIGITS = 100  # tells a true zero from a small number
_LARGEST_BITS = 20_000


class TooLarge(ValueError):
    """The formula has no value of a size that can be worked with, or none at all, such as 1/0."""


@cache
def context(digits: int) -> Any:
    """An mpmath context of its own, which nobody else changes."""
    from mpmath.ctx_mp import MPContext

    made = MPContext()
    made.dps = digits
    return made


def value(node: Node, *, point: int = 0, digits: int = DIGITS, log_base: int = 0) -> Any:
    """The value of a formula: a Fraction where it is rational, else an mpmath number.

    Args:
        node: what `read` returned.
        point: which of the chosen values its variables take.
        digits: precision of values that are not rational.
        log_base: base of a logarithm without one; 0: natural.

    Raises:
        TooLarge: it has none.
    """
    try:
        return _Evaluation(point, digits, log_base).of(node)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
        raise TooLarge(str(error)) from None


class _Evaluation:
    def __init__(self, point: int, digits: int, log_base: int):
        self.point, self.mp, self.log_base = point, context(digits), log_base

    def of(self, node: Node) -> Any:
        kind = node[0]
        if kind == "number":
            return node[1]
        if kind == "symbol":
            return _sample(node[1], self.point)
        if kind == "constant":
            return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1)}[node[1]]
        if kind == "call":
            return self.call(node[1], self.of(node[2]))
        left, right = self.of(node[1] if kind != "call2" else node[2]), self.of(node[2] if kind != "call2" else node[3])
        if kind == "call2":
            return self.binomial(left, right)
        if kind == "^":
            return self.to_the_power(left, right)
        if kind == "root":
            return self.root(left, right)
        if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
            left, right = self.number(left), self.number(right)
        return _OPERATIONS[kind](left, right)

    def number(self, given: Any) -> Any:
        return self.mp.mpf(given.numerator) / given.denominator if isinstance(given, Fraction) else given

    def to_the_power(self, base: Any, exponent: Any) -> Any:
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            power = int(exponent)
            if isinstance(base, Fraction):
                size = max(base.numerator.bit_length(), base.denominator.bit_length())
                if size * abs(power) <= _LARGEST_BITS or (size <= 1 and abs(power) < 10**9):
                    return base**power
                raise TooLarge("a power with thousands of digits")
            if abs(power) > 10_000:
                raise TooLarge("a large power")
            return base**power
        base, exponent = self.number(base), self.number(exponent)
        if base != 0 and abs(self.mp.log(abs(base)) * abs(exponent)) > _LARGEST_BITS:
            raise TooLarge("a large power")
        return base**exponent

    def root(self, radicand: Any, index: Any) -> Any:
        if not isinstance(index, Fraction) or index.denominator != 1 or not 0 < index < 1000:
            raise TooLarge("no such root")
        degree = int(index)
        if isinstance(radicand, Fraction):
            exact = _exact_root(radicand, degree)
            if exact is not None:
                return exact
            if radicand < 0 and degree % 2:
                return -self.mp.root(self.number(-radicand), degree)
        radicand = self.number(radicand)
        if degree == 2:
            return self.mp.sqrt(radicand)
        if degree % 2 and self.mp.im(radicand) == 0 and self.mp.re(radicand) < 0:
            return -self.mp.root(-radicand, degree)
        return self.mp.root(radicand, degree)

    def binomial(self, top: Any, bottom: Any) -> Any:
        whole = all(isinstance(part, Fraction) and part.denominator == 1 for part in (top, bottom))
        if isinstance(top, Fraction) and not whole and bottom in range(20):  # \binom{n}{2} is a polynomial
            return prod((top - each for each in range(int(bottom))), start=Fraction(1)) / factorial(int(bottom))
        if not whole or not 0 <= bottom <= top <= 2000:
            raise TooLarge("no such binomial coefficient")
        return Fraction(comb(int(top), int(bottom)))

    def call(self, name: str, argument: Any) -> Any:
        mp = self.mp
        if name == "abs":
            return abs(argument)
        if name == "degree":
            return mp.pi / 180
        if name in ("floor", "ceil"):
            if isinstance(argument, Fraction):
                return Fraction(argument.__floor__() if name == "floor" else argument.__ceil__())
            return Fraction(int(getattr(mp, name)(argument)))
        if name == "factorial":
            if not isinstance(argument, Fraction) or argument.denominator != 1 or not 0 <= argument <= 1000:
                raise TooLarge("no such factorial")
            return Fraction(factorial(int(argument)))
        given = self.number(argument)
        if name.startswith("unknown"):
            key = 2 + zlib.crc32(name.encode()) % 97
            return mp.sin(given * key / 10) + given * key / 7
        if name == "exp" and abs(given) > _LARGEST_BITS:
            raise TooLarge("a large exponential")
        if name == "log" and self.log_base:
            return mp.log(given) / mp.log(self.log_base)
        if name == "lg":
            return mp.log(given) / mp.log(10)
        exact = {"ln": {1: 0}, "log": {1: 0}, "sin": {0: 0}, "tan": {0: 0}, "cos": {0: 1}, "exp": {0: 1}}
        if given in exact.get(name, {}):
            return Fraction(exact[name][int(mp.re(given))])
        return _functions(mp)[name](given)


def _functions(mp: Any) -> dict[str, Callable[[Any], Any]]:
    names = "sin cos tan cot sec csc sinh cosh tanh exp asin acos atan"
    found = {name: getattr(mp, name) for name in names.split()}
    found |= {f"arc{name}": getattr(mp, f"a{name}") for name in ("sin", "cos", "tan", "cot")}
    return found | {"ln": mp.log, "log": mp.log}


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
}


def _sample(name: str, point: int) -> Fraction:
    """The value that a variable takes at a point: small, positive at the first, negative for some at the others."""
    draw = zlib.crc32(f"{name} {point}".encode())
    size = Fraction(31 + draw % 389, 97 + (draw >> 9) % 83)
    return -size if point and (draw >> 20) % 2 else size


def _exact_root(radicand: Fraction, degree: int) -> Fraction | None:
    """The rational root of a rational number; None where it has none."""
    if radicand < 0:
        if degree % 2 == 0:
            return None
        positive = _exact_root(-radicand, degree)
        return None if positive is None else -positive
    parts = []
    for whole in (radicand.numerator, radicand.denominator):
        root = _integer_root(whole, degree)
        if root**degree != whole:
            return None
        parts.append(root)
    return Fraction(parts[0], parts[1])


def _integer_root(whole: int, degree: int) -> int:
    if degree == 2:
        return isqrt(whole)
    low, high = 0, 1 << (whole.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= whole else (low, middle - 1)
    return low
