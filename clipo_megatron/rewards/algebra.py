"""Expressions as SymPy objects, read by the parser of `expression.py`. SymPy's own parser evaluates its text as Python.

SymPy is imported by the first expression: it takes half a second.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any

from clipo_megatron.rewards.expression import Arithmetic, read, refuse_large_power

if TYPE_CHECKING:
    import sympy

_FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc", "sinh", "cosh", "tanh"),
    *("coth", "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "cbrt", "Abs", "erf", "erfi", "Integral"),
)
_FEW_LETTERS = ("sqrt", "ln", "csc", "re", "im", "li", "frac")  # what mode `reference` lets pass of SymPy's names
_BASIC = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}


def read_formula(text: str) -> sympy.Expr:
    """A formula in which every product is written out, such as -3*x**2*sin(x) + C.

    Raises:
        UnreadableError: it is none, or a power in it is too large.
    """
    return read(text, _formulas())


def read_informal(text: str) -> sympy.Expr:
    """A formula in which 2xy(x+1) is a product: names are taken letter by letter, but for Greek ones.

    Raises:
        UnreadableError: it is none.
    """
    return read(text, _informal_formulas())


@cache
def _formulas() -> Arithmetic:
    import sympy

    functions = {name: getattr(sympy, name) for name in _FUNCTIONS}
    return Arithmetic(_number, {**_BASIC, "**": _power}, _constant_or_symbol, functions)


@cache
def _informal_formulas() -> Arithmetic:
    import sympy

    functions = {name: getattr(sympy, name) for name in _FEW_LETTERS} | {"!": sympy.factorial}
    operators = {**_BASIC, "**": operator.pow, "<<": operator.lshift, ">>": operator.rshift}
    return Arithmetic(_number, operators, _product_of_letters, functions, is_juxtaposed=True)


def _number(numeral: str) -> sympy.Number:
    import sympy

    if numeral.isdigit():
        return sympy.Integer(int(numeral))
    return sympy.Integer(int(numeral, 16)) if numeral[:2].lower() == "0x" else sympy.Float(numeral)


def _constant_or_symbol(name: str) -> sympy.Expr:
    import sympy

    return getattr(sympy, name) if name in ("pi", "E", "I") else sympy.Symbol(name)


def _power(base: Any, exponent: Any) -> Any:
    if exponent.is_Rational or exponent.is_Float:
        bits = max(abs(base.p), base.q).bit_length() if base.is_Rational else 64
        refuse_large_power(bits, int(exponent))
    return base**exponent


def _product_of_letters(name: str) -> sympy.Expr:
    import sympy

    if name in ("pi", "oo", "zoo", "nan"):
        return getattr(sympy, name)
    if len(name) == 1 or "_" in name or _is_greek(name):
        return sympy.Symbol(name)
    parts = re.findall(r"\d+|\D", name)
    return sympy.prod([sympy.Integer(int(part)) if part.isdigit() else sympy.Symbol(part) for part in parts])


def _is_greek(name: str) -> bool:
    try:
        return bool(unicodedata.lookup(f"GREEK SMALL LETTER {name}"))
    except KeyError:
        return False
