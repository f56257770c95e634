"""Reads expressions as Python and SymPy write them, by a parser of their grammar: no text is evaluated as code.

    read("3*(4 + 5)**2", FRACTIONS)     243
    read("(0x1f << 2) - 1", INTEGERS)   123

Names, attributes, calls, strings, comparisons and everything else of Python's are unreadable, but for the names and
functions that an `Arithmetic` lists.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

_TOKEN = re.compile(
    r"""\s* (?:
      (?P<number> 0[xX][0-9a-fA-F]+ | (?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)? | [0-9]+[eE][-+]?[0-9]+
                | 0+ | [1-9][0-9]* )  # as Python does, 023 is 0 and 23
    | (?P<name> [^\W\d]\w* )
    | (?P<sign> \*\*|//|<<|>>|[-+*/%&|^~!(),] )
    )""",
    re.VERBOSE,
)
_LEVELS = {"|": 1, "^": 2, "&": 3, "<<": 4, ">>": 4, "+": 5, "-": 5, "*": 6, "/": 6, "//": 6, "%": 6}
_DEEPEST = 50  # nested parentheses, signs and powers
_MOST_BITS = 100_000  # of a power, a shift


class UnreadableError(ValueError):
    """A text is no expression of this kind of arithmetic."""


@dataclass(frozen=True)
class Arithmetic:
    """What the parts of an expression mean.

    Attributes:
        number: the value of a numeral.
        operators: functions of two values by sign, of those that may occur; `**` among them.
        name: the value of a name that is no function.
        functions: functions by name; "!" is that of a factorial.
        is_juxtaposed: whether 2x and (a)(b) are products, as x*y is.
    """

    number: Callable[[str], Any]
    operators: Mapping[str, Callable[[Any, Any], Any]]
    name: Callable[[str], Any] | None = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    is_juxtaposed: bool = False


def read(text: str, arithmetic: Arithmetic) -> Any:
    """The value of an expression.

    Raises:
        UnreadableError: it is none.
        Exception: what the arithmetic raises, such as a ZeroDivisionError.
    """
    reader = _ExpressionReader(text, arithmetic)
    value = reader.sum_of()
    if reader.kind:
        raise UnreadableError(f"{reader.token!r} follows the end of an expression")
    return value


class _ExpressionReader:
    """A text and the token that is read next; its kind is "" at the end."""

    def __init__(self, text: str, arithmetic: Arithmetic):
        self._text, self._arithmetic = text.rstrip(), arithmetic
        self._place = self._depth = 0
        self.kind = self.token = ""
        self._advance()

    def sum_of(self, lowest: int = 0) -> Any:
        """An expression of operators of at least this level."""
        value = self._signed()
        while True:
            sign = self.token if self.kind == "sign" else ""
            is_product = self._arithmetic.is_juxtaposed and (self.kind in ("number", "name") or sign == "(")
            level = _LEVELS.get("*" if is_product else sign, -1)
            if level < lowest or level < 0:
                return value
            if not is_product:
                self._advance()
            value = self._operator("*" if is_product else sign)(value, self.sum_of(level + 1))

    def _signed(self) -> Any:
        if self.kind == "sign" and self.token in ("-", "+", "~"):
            function = {"-": operator.neg, "+": operator.pos, "~": operator.invert}[self.token]
            self._advance()
            return function(self._deeper(self._signed))
        base = self._factorial()
        if self.kind == "sign" and self.token == "**":
            self._advance()
            return self._operator("**")(base, self._deeper(self._signed))
        return base

    def _factorial(self) -> Any:
        value = self._operand()
        while self.kind == "sign" and self.token == "!":
            value = self._function("!")(value)
            self._advance()
        return value

    def _operand(self) -> Any:
        kind, token = self.kind, self.token
        self._advance()
        if kind == "number":
            return self._arithmetic.number(token)
        if kind == "name" and self._arithmetic.name is not None:
            if token in self._arithmetic.functions:
                return self._function(token)(*self._arguments())
            if self.token == "(" and not self._arithmetic.is_juxtaposed:
                raise UnreadableError(f"{token!r} is no function")
            return self._arithmetic.name(token)
        if kind == "sign" and token == "(":
            return self._closed(self._deeper(self.sum_of))
        raise UnreadableError(f"{token!r} stands where a number is expected")

    def _arguments(self) -> list[Any]:
        if self.token != "(":
            raise UnreadableError("a function has no arguments")
        found = []
        while not found or self.token == ",":
            self._advance()
            found.append(self._deeper(self.sum_of))
        return self._closed(found)

    def _closed(self, value: Any) -> Any:
        if self.token != ")":
            raise UnreadableError("a parenthesis is not closed")
        self._advance()
        return value

    def _deeper(self, read_part: Callable[[], Any]) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise UnreadableError("parts are nested too deeply")
        value = read_part()
        self._depth -= 1
        return value

    def _operator(self, sign: str) -> Callable[[Any, Any], Any]:
        if sign not in self._arithmetic.operators:
            raise UnreadableError(f"there is no operator {sign!r}")
        return self._arithmetic.operators[sign]

    def _function(self, name: str) -> Callable[..., Any]:
        if name not in self._arithmetic.functions:
            raise UnreadableError(f"there is no function {name!r}")
        return self._arithmetic.functions[name]

    def _advance(self) -> None:
        if self._place == len(self._text):
            self.kind = self.token = ""
            return
        match = _TOKEN.match(self._text, self._place)
        if match is None:
            raise UnreadableError(f"{self._text[self._place : self._place + 20]!r} is not read")
        self._place, self.kind, self.token = match.end(), match.lastgroup, match[match.lastgroup]


def refuse_large_power(bits: int, exponent: Any) -> None:
    """Refuse a power whose base has this many bits, where it would be too long to be an answer.

    Raises:
        UnreadableError: it would.
    """
    if abs(exponent) * bits > _MOST_BITS:
        raise UnreadableError("a power is too large")


def _power(base: Any, exponent: Any) -> Any:
    is_exact = isinstance(base, (int, Fraction))
    refuse_large_power(max(abs(base.numerator), base.denominator).bit_length() if is_exact else 64, exponent)
    return base**exponent


def _shifted_left(value: int, places: int) -> int:
    if places + value.bit_length() > _MOST_BITS:
        raise UnreadableError("a shift is too large")
    return value << places


def _fraction(numeral: str) -> Fraction:
    return Fraction(float(numeral)) if "e" in numeral.lower() else Fraction(numeral)  # 1e999999999 is infinite


_BASIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}
FRACTIONS = Arithmetic(_fraction, {**_BASIC, "/": operator.truediv, "**": _power})
INTEGERS = Arithmetic(
    lambda numeral: int(numeral, 0),
    {
        **_BASIC,
        "**": _power,
        "<<": _shifted_left,
        ">>": operator.rshift,
        "&": operator.and_,
        "|": operator.or_,
        "^": operator.xor,
    },
)
