r"""Mathematical equality: an answer is correct if math-verify or the reference's rules accept it.

Only the final answer counts: the last `\boxed{}` after the last `</think>`. A response without a box is wrong, even
when its text contains the correct number: prompts ask for the box, and accepting numbers from prose would reward lists
of candidates. Several values in one box ("1 or 2") are a set, which equals only an equal set.

Leniencies of the two that accept another value are removed: "5\text{ or }6" and "5\text{ million}" are not 5, a set is
neither an ordered pair nor an interval, 204_6 is not 204_5, and a small decimal is compared to six significant digits
instead of six decimals (0.000067 is not 0.0000672).
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from math import floor, log10
from typing import Any

from clipo_megatron.rewards import choice, reference
from clipo_megatron.rewards.answer import after_thinking, gold_answer, is_choice_source, last_boxed

_BASE = re.compile(r"_\{?(\d+)\}?\s*$")
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NO_UNIT = re.compile(rf"\\text\{{\s*,?\s*(?:or|and|but|not|{'|'.join(_POWERS)})\b")
_MAGNITUDE = re.compile(rf"\\text\{{\s*({'|'.join(_POWERS)})\b[^{{}}]*\}}|(?<=\d)\s*({'|'.join(_POWERS)})\b")
_TRAILING_CURRENCY = re.compile(r"(?<=[\d}])\s*dollars?\s*$")  # math-verify drops cents, not dollars
_SIGNIFICANT_DIGITS = 6


def grade(response: str, ground_truth: str, *, data_source: str, extra: Any = None) -> float:
    """1.0 if the final answer of `response` equals the gold answer, else 0.0. `extra` is not used.

    Multiple-choice sources are judged as in `choice.py`. SymPy may take arbitrarily long on a hostile answer; only
    the pool has a deadline.

    Raises:
        MemoryError, RecursionError: the answer exhausted the process; the caller counts it as ungraded.
    """
    answer = last_boxed(after_thinking(response))
    if answer is None:
        return 0.0
    gold = gold_answer(ground_truth)
    if is_choice_source(data_source):
        return float(choice.agree(answer, gold))
    return float(agree(answer, gold, data_source=data_source))


def agree(answer: str, gold: str, *, data_source: str = "") -> bool:
    """Whether the final answer `answer` equals `gold`, by the reference's rules or as mathematics."""
    if not answer.strip():
        return False
    # The reference cuts "5\\text{ or }6" at the text, as if a unit followed; here only a unit may be cut.
    cut = _NO_UNIT.search(answer) and not _NO_UNIT.search(gold)
    if not cut and reference.agree(answer, gold, data_source=data_source):
        return True
    return _equal_expressions(_spelled_out(answer), _spelled_out(gold))


def _spelled_out(text: str) -> str:
    """`text` without what math-verify misreads: magnitudes as words, dollars after the number, ties."""
    text = _MAGNITUDE.sub(lambda word: f" \\cdot 10^{{{_POWERS[word[1] or word[2]]}}}", text)
    return _TRAILING_CURRENCY.sub("", text).replace("~", " ")


def _equal_expressions(answer: str, gold: str) -> bool:
    if len(answer) > 2000 + 4 * len(gold):  # longer than any form of the gold answer; parsing it would take minutes
        return False
    bases = _BASE.search(answer), _BASE.search(gold)
    if all(bases) and bases[0].group(1) != bases[1].group(1):  # 204_5 is not 204_6; math-verify drops the base
        return False

    import math_verify  # takes a second, since it imports SymPy
    from sympy import FiniteSet, Interval, Tuple

    try:
        golds, answers = _parse(gold), _parse(answer)
        if not golds or not answers:
            return False
        if isinstance(golds[0], (Interval, Tuple)) and isinstance(answers[0], FiniteSet):
            return False
        return math_verify.verify(
            golds, answers, float_rounding=_decimals(golds[0]), timeout_seconds=None, raise_on_error=True
        )
    except (MemoryError, RecursionError):
        raise
    except (
        Exception
    ):  # an answer that cannot be compared with the gold answer is not equal to it; SymPy raises anything
        return False


@lru_cache(maxsize=256)  # the gold answer is parsed once a group
def _parse(text: str) -> list[Any]:
    """SymPy expression and normalised string of `text`; the string alone when it is no expression."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeout is off; the pool has one
    boxed = f"\\boxed{{{text}}}"
    return math_verify.parse(boxed, [math_verify.LatexExtractionConfig()], parsing_timeout=None)


def _decimals(gold: Any) -> int:
    """Decimals that hold six significant digits of `gold`; six for anything but a small number."""
    if not getattr(gold, "is_number", False) or not gold.is_real:
        return _SIGNIFICANT_DIGITS
    magnitude = abs(float(gold))
    if not 0 < magnitude < 0.1:
        return _SIGNIFICANT_DIGITS
    return _SIGNIFICANT_DIGITS - 1 - floor(log10(magnitude))
