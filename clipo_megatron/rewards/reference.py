r"""The grader of the CLIPO paper's released implementation, rule by rule, for comparison with published scores.

The final answer (`answer.py`) equals the gold answer when one of these rules holds:

1. Multiple choice: the text before the first "." is the gold letter, exactly.
2. The string rules of the MATH benchmark (Hendrycks et al., arXiv 2103.03874): the two strings agree after spacing,
   units, `\left`, degrees, dollars, percent signs and the spellings of fractions and roots are unified.
3. The rules of PRM800K's grader (Lightman et al., arXiv 2305.20050): after a looser normalisation the strings agree,
   or, element by element of a tuple, SymPy finds the difference to be zero. A fraction must have the gold's
   numerator and denominator, and an integer must be written as one.

Known to be too strict, as the original is: it rejects \frac{2}{4} for 1/2, 6/2 for 3, 2^{10} for 1024, {1,2}
for 2,1, and \text{C}, (C) and c for the choice C. Known to be lenient: 32.5\% for 32.5, x=5 for 5, letter case,
5\text{ or }6 for 5 (the text counts as a unit), 3.5e-8 for 0 (a number within 1e-7 of an integer is that integer).
One deliberate difference: `\boxed 9` without braces is read as 9, in answers and in ground truths.
"""

from __future__ import annotations

import re
from typing import Any

from clipo_megatron.rewards.algebra import read_informal
from clipo_megatron.rewards.answer import after_thinking, gold_answer, is_choice_source, last_boxed
from clipo_megatron.rewards.latex_text import LatexError, latex_to_text

_WRAPPED_TEXT = re.compile(r"^\\text\{(.+?)\}$")


def grade(response: str, ground_truth: str, *, data_source: str, extra: Any = None, asked: Any = None) -> float:
    """1.0 if the reference grader accepts `response`, else 0.0. `extra` and `asked` are not used.

    Raises:
        MemoryError, RecursionError: the answer exhausted the process; the caller counts it as ungraded.
    """
    answer = last_boxed(after_thinking(response))
    return float(answer is not None and agree(answer, gold_answer(ground_truth), data_source=data_source))


def agree(answer: str, gold: str, *, data_source: str) -> bool:
    """Whether the final answer `answer` equals `gold` under the rules for `data_source`."""
    if is_choice_source(data_source):
        return answer.partition(".")[0].strip() == gold.strip()
    return benchmark_form(answer) == benchmark_form(gold) or _equal_by_value(answer, gold)


# Rule 2: a normal form by string replacement.


class _Unreadable(ValueError):
    """The string rules do not apply to this answer, which is compared unchanged."""


def benchmark_form(answer: str) -> str:
    """An answer in the normal form that rule 2 compares."""
    answer = answer.strip()
    wrapped = _WRAPPED_TEXT.search(answer)
    if wrapped:
        answer = wrapped.group(1).strip()
    try:
        return _unify_spelling(answer)
    except _Unreadable:
        return answer


def _unify_spelling(text: str) -> str:
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if "\\text{ " in text:  # a unit follows its number
        text, _, more = text.partition("\\text{ ")
        if "\\text{ " in more:
            raise _Unreadable
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:  # "x=5", but not "f(x)=5"
        text = value
    text = _brace_fractions(_brace_roots(text).replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    return _slash_to_fraction(text)


def _brace_roots(text: str) -> str:
    r"""\sqrt3 -> \sqrt{3}."""
    head, *roots = text.split("\\sqrt")
    if not all(roots):
        raise _Unreadable
    return head + "".join("\\sqrt" + (r if r[0] == "{" else f"{{{r[0]}}}{r[1:]}") for r in roots)


def _brace_fractions(text: str) -> str:
    r"""\frac12 -> \frac{1}{2}, \frac1{72} -> \frac{1}{72}."""
    head, *fractions = text.split("\\frac")
    parts = [head]
    for fraction in fractions:
        if not fraction:
            raise _Unreadable
        if fraction[0] != "{":
            if len(fraction) < 2:
                return text
            numerator, denominator, rest = fraction[0], fraction[1], fraction[2:]
            fraction = f"{{{numerator}}}" + (denominator if denominator == "{" else f"{{{denominator}}}") + rest
        parts.append(fraction)
    return "\\frac".join(parts)


def _slash_to_fraction(text: str) -> str:
    r"""3/4 -> \frac{3}{4}, for two plain integers only."""
    whole = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text, re.ASCII)
    return f"\\frac{{{whole.group(1)}}}{{{whole.group(2)}}}" if whole else text


# Rule 3: looser normalisation, then tuples element by element, then SymPy.

_UNITS = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard"
_MAGNITUDES = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}
_PLAIN_SYMBOLS = {"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"}
_THOUSANDS = re.compile(r"(\d),(\d\d\d)($|\D)")
_FRACTION = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
_BRACKETS = "()[]"
# Powers of powers and large exponents are not evaluated: SymPy would not return.
_NOT_EVALUATED = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+")
# Answers with these characters are not arithmetic.
_NOT_ARITHMETIC = re.compile(r"__|[\"'`;:@\\]")


def _equal_by_value(answer: str, gold: str) -> bool:
    answer, gold = _value_form(answer), _value_form(gold)
    if answer == gold:
        return True
    if not answer:
        return False
    answers, golds = _elements(answer), _elements(gold)
    if len(golds) > 1 and (gold[0], gold[-1]) != (answer[0], answer[-1]):
        return False
    return len(answers) == len(golds) and all(_same_element(a, g) for a, g in zip(answers, golds, strict=True))


def _same_element(answer: str, gold: str) -> bool:
    if _FRACTION.search(answer) and _FRACTION.search(gold):
        return answer == gold
    if _is_integer(answer) != _is_integer(gold):
        return False
    return _difference_is_zero(answer, gold)


def _value_form(text: str) -> str:
    wrapped = _WRAPPED_TEXT.search(text)
    if wrapped:
        text = wrapped.group(1)
    text = text.replace("\\%", "").replace("%", "").replace("\\$", "").replace("$", "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, power in _MAGNITUDES.items():
        text = text.replace(word, power)
    for unit in _UNITS.split():
        text = re.sub(rf"{unit}(es)?s? *(\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    text = _shorten_integer(text)
    if "\\" in text:
        text = _plain(text)
    text = re.sub(r"- *", "-", text)
    text = re.sub(r"([0-9]) +([0-9])", r"\1+\2", text)  # mixed numbers: 7 3/4 -> 7+3/4
    text = text.replace(" ", "").replace("{", "").replace("}", "").lower()
    return str(int(float(text.replace(",", "")))) if _is_integer(text) else text


def _shorten_integer(text: str) -> str:
    """13.0 -> 13; any other text unchanged."""
    try:
        value = float(text)
        return str(round(value)) if abs(value - round(value)) <= 1e-7 else text
    except (ValueError, OverflowError):
        return text


def _plain(latex: str) -> str:
    latex = latex.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\frac", " \\frac")
    try:
        text = latex_to_text(latex)
    except LatexError:
        return latex
    for symbol, name in _PLAIN_SYMBOLS.items():
        text = text.replace(symbol, name)
    return text.strip()


def _without_thousands_commas(text: str) -> str:
    while (shorter := _THOUSANDS.sub(r"\1\2\3", text)) != text:
        text = shorter
    return text


def _is_integer(text: str) -> bool:
    try:
        value = float(_without_thousands_commas(text))
        return abs(value - round(value)) <= 1e-7
    except (ValueError, OverflowError):
        return False


def _elements(text: str) -> list[str]:
    text = _without_thousands_commas(text)
    inside = text[1:-1]
    if inside and text[0] in _BRACKETS and text[-1] in _BRACKETS and not any(b in inside for b in _BRACKETS):
        return [element.strip() for element in inside.split(",")]
    return [text]


def _difference_is_zero(answer: str, gold: str) -> bool:
    expression = f"({gold})-({answer})"
    letters = {c for c in expression.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    if len(letters) > 2 or _NOT_EVALUATED.search(expression) or _NOT_ARITHMETIC.search(expression):
        return False

    import sympy  # takes half a second, and few answers need it

    try:
        return bool(sympy.simplify(read_informal(expression.replace("^", "**"))) == 0)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # text that is no expression is unreadable, and SymPy raises anything
        return False
