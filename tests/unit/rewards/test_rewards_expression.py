"""Expressions are read as Python and SymPy read them, and nothing else is read."""

import random

import pytest
import sympy
from sympy.parsing.sympy_parser import (
    implicit_multiplication_application,
    parse_expr,
    standard_transformations,
)

from clipo_megatron.rewards.algebra import read_formula, read_informal
from clipo_megatron.rewards.expression import FRACTIONS, INTEGERS, UnreadableError, read

INFORMAL = (*standard_transformations, implicit_multiplication_application)
CODE = [
    "__import__('os')", "().__class__", "x.real", "1 .real", "(lambda: 1)()", "[1 for _ in (1,)]", "f'{1}'", "'a'",
    "Symbol('x').__class__", "x[0]", "1 < 2", "1 == 1", "a := 1", "1;2", "{1}", "[1]", "1,2", "`1`", "...", "@x", "x=1",
    "x._＿ⅽⅼass_＿", "", "(", ")", "1+", "*1", "(" * 200 + "1" + ")" * 200, "-" * 200 + "1", "1" * 5000,
]  # fmt: skip
WORDS = ["1 if 1 else 2", "not 1", "print(1)", "1 2", "1_000", "0b1", "1j"]  # products, where these need no sign
TOO_LARGE = ["9**9**9", "((9**9)**9)**9**9", "(1 + 1)**100000000"]


def arithmetic(draw: random.Random, signs: str, depth: int = 4) -> str:
    """An expression of small numbers with signs that mean the same to exact numbers as to Python's integers."""
    if depth == 0 or draw.random() < 0.2:
        return str(draw.randrange(1, 20))
    left, right = (arithmetic(draw, signs, depth - 1) for _ in range(2))
    sign = draw.choice(signs.split())
    right = str(draw.randrange(4)) if sign in ("<<", ">>", "**") else right
    return draw.choice(("{}{}{}", "{} {} {}", "({}{}{})", "-({}{}{})", "-{}{}{}")).format(left, sign, right)


def test_arithmetic_has_the_values_that_python_gives_it():
    draw, compared = random.Random(1), 0
    for _ in range(500):
        exact, bits = arithmetic(draw, "+ - * **"), arithmetic(draw, "+ - * << >> & | ^")
        assert read(exact, FRACTIONS) == eval(exact), exact
        try:
            expected = eval(bits)
        except ValueError:  # a negative shift
            continue
        compared += 1
        assert read(bits, INTEGERS) == expected, bits
    assert compared > 300
    assert read("0x1F - 10", INTEGERS) == 21
    assert read("1/3 + .5*2", FRACTIONS) * 3 == 4


@pytest.mark.parametrize("text", CODE + WORDS)
def test_code_is_no_expression(text):
    for kind in (FRACTIONS, INTEGERS):
        with pytest.raises(ValueError):
            read(text, kind)
    with pytest.raises(ValueError):
        read_formula(text)
    if text in CODE:
        with pytest.raises(ValueError):
            read_informal(text)


@pytest.mark.parametrize("text", ["x", "open", "ⅽⅼass"])
def test_a_name_is_a_symbol_and_nothing_else(text):
    assert read_formula(text) == sympy.Symbol(text)
    with pytest.raises(UnreadableError):
        read(text, FRACTIONS)


@pytest.mark.parametrize("text", TOO_LARGE)
def test_powers_that_no_answer_needs_are_refused(text):
    for kind in (FRACTIONS, INTEGERS):
        with pytest.raises(UnreadableError, match="too large"):
            read(text, kind)
    with pytest.raises(UnreadableError, match="too large"):
        read_formula(text)


FORMULAS = [
    "x**2 + 2*x - 3/4", "-3*X**3*sin(X) + 18*cos(X) + C", "exp(2*x)/2 + E**x", "sqrt(3*x + 1)*(2*x/3 + 2/9)",
    "x*log(x) - x + C", "0.5*x**2 + 1e-3", "asin(3*x)/3 + atan(x)", "2**-x", "-x**2", "pi*I", "log(x, 10)",
    "Integral(x*cos(x), x) + C", "x**2*y*z - 4*x*y**3", "(x + 1)*(x - 1)", "7//2 + 7%4",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_the_one_that_sympy_reads(text):
    assert read_formula(text) == parse_expr(text, local_dict={"C": sympy.Symbol("C")})


LOOSE = [
    "2x+3", "xy", "2(x+1)(x-1)", "x(3)", "3x**2y", "1/2x", "2pi", "sqrt(2)x", "3!", "x!", "2**3!", "(x+1)!", "xi",
    "x_1", "x2", "023x", "1.5x", "ln(2)", "pi/2", "(1)(2)3", "-2x**-2", "2sqrt(3)/3", "x12y", "5<<2", "1/0", "0x1",
]  # fmt: skip


@pytest.mark.parametrize("text", LOOSE)
def test_products_without_a_sign_are_those_that_sympy_reads(text):
    assert read_informal(text) == parse_expr(text, transformations=INFORMAL)


@pytest.mark.parametrize("text", ["(2*x)**100000000", "2**(100000000 + 1/2)", "1.5**1e9", "2**x**100000000"])
def test_powers_of_formulas_that_would_take_hours_are_refused(text):
    with pytest.raises(UnreadableError, match="too large"):
        read_formula(text)
