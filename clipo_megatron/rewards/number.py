r"""The last number of a response: the "flexible" extraction usual for GSM8K-like tasks, where every answer is a number.

    So she pays 3 * $450 = $1,350.          1350
    <think>7</think> I get \boxed{-2.50}    -5/2
    3 - 5 = -2                              -2
    9-7                                     7: nothing is computed, and the minus is that of a subtraction

The number is the last one after the last `</think>`, or the last one of the last `\boxed{}` there; a box without a
number is wrong. It must equal the ground truth's number exactly, as a value: 72 = 72.0 = 72.00. Thousands commas, a
leading sign, a trailing period, percent, dollar and degree signs and units are not part of the value: 50% is 50, not
0.5. A fraction or a mixed number (3/4, \frac{3}{4}, 1 1/2) is one number, and so is 1.5e3. Where the last number is
part of something else (\sqrt{2}, 3\pi, 2^{10}, \frac{x}{2}, 5 million), the response has no readable number and is
wrong. Number words, exponents (cm^2), indices (x_1, log_2) and names (H2O) are not numbers.

This accepts more than `math` does: a response that ends with the correct number is correct, whatever the number was
said to be. Use it for tasks that ask for one number, and `math` where a box is asked for.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from clipo_megatron.data.asked import NOTHING, Asked
from clipo_megatron.rewards.final_answer import box_or_text, gold_answer

_LONGEST_NUMERAL = 200  # characters; no task has a longer answer, and exact arithmetic stays fast
_LARGEST_EXPONENT = 400
# Possessive quantifiers keep a search linear in the text, whatever it is.
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?+|(?<![0-9A-Za-z.])\.[0-9]++"
_OPAQUE = r"(?:sqrt|[dtc]?frac|pi|infty)(?![A-Za-z])"
_TOKEN = re.compile(
    rf"""
      (?P<raised> [\^_] \s*+ (?: \{{[^{{}}]*+\}} | [-+]?\w++ ) )
    | (?P<opaque> \\{_OPAQUE} (?:\[[^\]]{{0,9}}\])?+ (?: \s*+ \{{[^{{}}]*+\}} )*+
                | [√π∞] \s*+ [0-9.]*+ )
    | (?<![0-9A-Za-z_]) (?<![0-9]\.)
      (?: (?P<whole> [0-9]++ (?=[ ]{{1,3}}[0-9]++/[0-9]) )[ ]++ )?+
      (?P<numeral> {_DECIMAL} )
      (?P<exponent> [eE][-+]?[0-9]++ )?+
      (?: /(?P<denominator> [0-9]++ ) (?!/) )?+
      (?P<more> \s*+ (?: (?:\^|\*\*) \s*+ (?: \{{[^{{}}]*+\}} | [-+]?\w++ )?+
                      | (?:hundred|thousand|million|billion|trillion)\b ) )?+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*+(?:\{\s*+(-?[0-9.]++)\s*+\}|([0-9]))\s*+(?:\{\s*+([0-9]++)\s*+\}|([0-9]))")
_MACRO = re.compile(rf"\\(?!{_OPAQUE})[A-Za-z]++")
_DEGREES = re.compile(r"\^\s*+(?:\\circ|\{\s*+\\circ\s*+\})")
_THIN_SPACE = re.compile(r"(?<=[0-9])(?:\\[,!]|\{,\}(?:\\!)?|,\\!)(?=[0-9]{3}(?![0-9]))")


def grade(
    response: str, ground_truth: str, *, data_source: str = "", extra: Any = None, asked: Asked = NOTHING
) -> float:
    """1.0 if the last number of `response` equals the ground truth's last, else 0.0.

    A ground truth without a number equals no answer. `data_source` and `extra` are not used.
    """
    answer = final_number(response, thinking=asked.thinking)
    return float(answer is not None and answer == last_number(f"={gold_answer(ground_truth)}"))


def final_number(response: str, *, thinking: bool = False) -> Fraction | None:
    """The number that a response ends with (see the module's docstring); None when there is none.

    Args:
        response: the model's text.
        thinking: whether the prompt opened the thinking.
    """
    boxed, text = box_or_text(response, thinking=thinking)
    return last_number(text) if boxed is None else last_number(f"={boxed}")


def last_number(text: str) -> Fraction | None:
    """The value of the last number in `text`; None when there is none, or when it is part of an expression."""
    text = _plain_numerals(text)
    last = None
    for token in _TOKEN.finditer(text):
        if token["opaque"] or token["numeral"]:
            last = token
    if last is None or last["opaque"] or last["more"] or last.end() - last.start() > _LONGEST_NUMERAL:
        return None
    if last["exponent"] and abs(int(last["exponent"][1:])) > _LARGEST_EXPONENT:
        return None
    denominator = int(last["denominator"] or 1)
    if denominator == 0:
        return None
    value = Fraction(last["numeral"].replace(",", "") + (last["exponent"] or "")) / denominator
    value += int(last["whole"] or 0)
    return -value if _is_negative(text[max(0, last.start() - 20) : last.start()]) else value


def _plain_numerals(text: str) -> str:
    r"""`text` with \frac{1}{2} as 1/2, 1{,}000 and 1\,000 as 1,000, and without degrees and harmless macros."""
    text = _THIN_SPACE.sub(",", _DEGREES.sub("", text.replace("−", "-")))

    def spelled(match: re.Match[str]) -> str:
        after_digit = match.start() > 0 and match.string[match.start() - 1].isdigit()
        return f"{' ' * after_digit}{match[1] or match[2]}/{match[3] or match[4]}"

    return _MACRO.sub(" ", _FRACTION.sub(spelled, text))


def _is_negative(before: str) -> bool:
    """Whether a number after the text `before` has a minus of its own."""
    before = before.removesuffix("\\$").removesuffix("$")
    operator = before.rstrip(" ")
    if not operator.endswith("-"):
        return False
    left = operator[:-1]
    if operator != before:  # "3 - 5" subtracts, "- 5" may be an item of a list; only "= - 5" is a sign
        return left.rstrip(" ").endswith(("=", "(", ":", "≈"))
    return not re.search(r"[0-9A-Za-z)\]}%]$", left)
