"""Equality by math-verify and SymPy, for notation that this project does not read: sums, integrals, limits.

Math-verify reads LaTeX by a grammar. SymPy's own parser, which evaluates its text, gets nothing of an answer but
numerals.

Math-verify finds numbers equal that differ by less than a fixed amount; so numbers are compared here, relative to their
size, and the library's word counts for what has no value.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from clipo_megatron.rewards import formula

_LONGEST = 500  # characters; parsing takes minutes beyond some thousand
_DEEPEST = 30
_RELATIVE = 1e-12
_NOTATION = re.compile(r"\\(?!text|frac|sqrt|pi(?![a-z])|cdot|times|%)[A-Za-z]+|[\^_]|\d\s*[-+*/]")


def equal(answer: str, gold: str) -> bool:
    """Whether the library reads both texts as mathematics and finds them equal.

    Raises:
        MemoryError, RecursionError: the answer exhausted the process; the caller counts it as ungraded.
    """
    if max(len(answer), len(gold)) > _LONGEST or max(_depth(answer), _depth(gold)) > _DEEPEST:
        return False
    if not all(formula.is_readable(text) or _NOTATION.search(text) for text in (answer, gold)):
        return False  # words
    try:
        golds, answers = _parse(gold), _parse(answer)
        return bool(golds and answers) and _compare(answers, golds)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # what cannot be compared with the gold answer is not equal to it; SymPy raises anything
        return False


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _compare(answers: list[Any], golds: list[Any]) -> bool:
    import math_verify
    from sympy import Expr, FiniteSet, Interval, Tuple
    from sympy.core.relational import Relational

    mine, theirs = answers[0], golds[0]
    if isinstance(theirs, (Interval, Tuple)) and isinstance(mine, FiniteSet):
        return False
    if isinstance(mine, Relational) != isinstance(theirs, Relational):
        return False  # 7 = 11a + c is not 11a + c
    if isinstance(mine, Expr) and isinstance(theirs, Expr):
        if mine.free_symbols != theirs.free_symbols:
            return False
        if not mine.free_symbols:
            return _close(mine, theirs)
    return math_verify.verify(golds, answers, float_rounding=12, timeout_seconds=None, raise_on_error=True)


def _close(answer: Any, gold: Any) -> bool:
    """Whether two numbers differ by a vanishing part of their size."""
    mine, theirs = answer.doit(), gold.doit()
    if mine == theirs:
        return True
    if mine.is_Integer and theirs.is_Integer:
        return False
    values = mine.evalf(30), theirs.evalf(30)
    size = max(abs(values[0]), abs(values[1]))
    return bool(size > 0 and abs(values[0] - values[1]) <= _RELATIVE * size)


@lru_cache(maxsize=256)  # the gold answer is parsed once a group
def _parse(text: str) -> list[Any]:
    """SymPy expression and normalised string of `text`; the string alone when it is no expression."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeout is off; the pool has one
    return math_verify.parse(f"\\boxed{{{text}}}", [math_verify.LatexExtractionConfig()], parsing_timeout=None)
