r"""Whether two answers without inner structure are equal: numbers and formulas, with units or in a base, and words.

    1/2, 0.5, \frac{2}{4}, 50\%, 0.5\text{ km}     1011_2 and 11_{10}     \text{Wednesday} and wednesday

A formula that this project reads is compared by its values. Others (sums, integrals, limits) are left to math-verify.
"""

from __future__ import annotations

import re

from clipo_megatron.rewards import closeness, symbolic
from clipo_megatron.rewards.units import is_known, split_unit, units_agree, with_magnitudes

_BASE = re.compile(
    r"(?:\((?=[^()]*\)))?(-?[0-9A-Za-z]+)\)?_\{?\s*(?:\\text\{)?(\d{1,2}|two|three|eight|ten|sixteen)\}?\s*\}?"
)
_BASE_WORDS = {"two": 2, "three": 3, "eight": 8, "ten": 10, "sixteen": 16}
_PERCENT = re.compile(r"(.*?)\s*(?:%|\\text\{\s*(?:percent|%)\s*\}|percent(?:age)?)", re.DOTALL)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*([ap])\.?\s*m\.?|(\d{1,2}):(\d\d)", re.IGNORECASE)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_INFINITE = re.compile(r"([-+]?)\s*(?:\\infty|infinity|oo)", re.IGNORECASE)
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # 1 2 is not 12
_SMALL_LETTERS = set("knjwv")  # a variable rather than kelvin, newton, joule, watt or volt
_NOT_A_NUMBER = {"nan", "none", "null", "n/a", "inf", "-inf", "undefinednan"}
_WORD = re.compile(r"[A-Za-z]{3,}|[^\x00-\x7f]")
_THREE_LETTERS = re.compile(r"[A-Za-z]{3}")
_NO = re.compile(r"[Nn]o|NO")


def leaves_agree(answer: str, gold: str) -> bool:
    """Whether two answers in plain spelling, none of them a list or an equation, are equal."""
    answer, gold = with_magnitudes(answer.strip()), with_magnitudes(gold.strip())
    if not answer or not gold or gold.lower() in _NOT_A_NUMBER:
        return False
    if _squeezed(answer) == _squeezed(gold):
        return True
    infinite = _INFINITE.fullmatch(_unwrapped(answer)), _INFINITE.fullmatch(_unwrapped(gold))
    if any(infinite):
        return all(infinite) and (infinite[0][1] == "-") == (infinite[1][1] == "-")
    for rule in (_bases, _percents, _with_units, _clocks, _ratios):
        verdict = rule(answer, gold)
        if verdict is not None:
            return verdict
    short = _unwrapped(answer), _unwrapped(gold)
    if all(map(_THREE_LETTERS.fullmatch, short)) or any(map(_NO.fullmatch, short)):  # words, no products of letters
        return short[0].casefold() == short[1].casefold()
    verdict = closeness.equal(answer, gold)
    if verdict is None:
        return _same_words(answer, gold) or symbolic.equal(answer, gold)
    return verdict or _same_number_before_short_unit(answer, gold)


def _squeezed(text: str) -> str:
    return _SPACE.sub("", text) if " " in text else text


def _bases(answer: str, gold: str) -> bool | None:
    """1011_2 and 11_{10} are equal; so are 1011 and 1011_2, where the question named the base."""
    found = _BASE.fullmatch(answer), _BASE.fullmatch(gold)
    if not any(found) or not all(each is None or each[1].lstrip("-")[0].isdigit() for each in found):
        return None
    if all(found):
        values = [_in_base(each[1], each[2]) for each in found if each]
        return None not in values and values[0] == values[1]
    digits = [(each[1] if each else text).strip() for each, text in zip(found, (answer, gold), strict=True)]
    return digits[0].lstrip("0") == digits[1].lstrip("0")


def _in_base(digits: str, base: str) -> int | None:
    try:
        return int(digits, _BASE_WORDS.get(base) or int(base))
    except ValueError:
        return None


def _percents(answer: str, gold: str) -> bool | None:
    """50% is 0.5, and 50 where the question asked for percent; 0.5 is not 50."""
    found = [_PERCENT.fullmatch(text) for text in (answer, gold)]
    if not any(found):
        return None
    numbers = [each[1] if each else text for each, text in zip(found, (answer, gold), strict=True)]
    if any(each is None and is_known(split_unit(text)[1]) for each, text in zip(found, (answer, gold), strict=True)):
        return False  # 17% is not 17 degrees
    if not numbers[0].strip() or not numbers[1].strip():
        return False
    if leaves_agree(numbers[0], numbers[1]):
        return True
    if all(found):
        return False
    hundredths = [f"\\frac{{{number}}}{{100}}" if each else number for each, number in zip(found, numbers, strict=True)]
    return leaves_agree(hundredths[0], hundredths[1])


def _with_units(answer: str, gold: str) -> bool | None:
    """5 cm is 5, and not 5 m. A unit that only one of them has is not judged."""
    (mine, my_unit), (theirs, their_unit) = split_unit(answer), split_unit(gold)
    if not my_unit and not their_unit:
        return None
    my_short, their_short = my_unit or split_unit(answer, short=True)[1], their_unit or split_unit(gold, short=True)[1]
    if my_short and their_short and not units_agree(my_short, their_short):
        return False
    if "degree" in (my_unit, their_unit) and "" in (my_unit, their_unit) and closeness.equal(answer, gold):
        return True  # 90^\circ is \pi/2
    return leaves_agree(mine, theirs)


def _same_number_before_short_unit(answer: str, gold: str) -> bool:
    """5m for 5: read as a product before, but the gold answer has no letter."""
    if any(letter.isalpha() for letter in gold):
        return False
    number, unit = split_unit(answer, short=True)
    if unit in _SMALL_LETTERS or re.search(r"\dK$", answer):  # 14k is a product or 14000
        return False
    return bool(unit) and leaves_agree(number, gold)


def _clocks(answer: str, gold: str) -> bool | None:
    if ":" not in answer or ":" not in gold:
        return None
    found = _CLOCK.fullmatch(_unwrapped(answer)), _CLOCK.fullmatch(_unwrapped(gold))
    if not all(found) or not (found[0][4] or found[1][4]):
        return None
    read = [
        (int(each[1] or each[5]), each[2] or each[6], each[3] or "00", (each[4] or "").lower())
        for each in found
        if each
    ]
    return read[0][:3] == read[1][:3] and ("" in (read[0][3], read[1][3]) or read[0][3] == read[1][3])


def _ratios(answer: str, gold: str) -> bool | None:
    """3:2 is 6:4; 3:30 is a time, and only itself."""
    found = _RATIO.fullmatch(_unwrapped(answer)), _RATIO.fullmatch(_unwrapped(gold))
    if not all(found):
        return None
    if any(len(each[2]) == 2 and each[2][0] in "012345" for each in found if each) and len(found[1][1]) <= 2:
        return [int(part) if part.isdigit() else part for part in found[0].groups()] == [
            int(part) if part.isdigit() else part for part in found[1].groups()
        ]
    mine, theirs = (f"\\frac{{{each[1]}}}{{{each[2]}}}" for each in found if each)
    return closeness.equal(mine, theirs) is True


def _unwrapped(text: str) -> str:
    return " ".join(_TEXT.sub(r"\1", text).split())


def _same_words(answer: str, gold: str) -> bool:
    """Whether two texts are equal up to case, spacing, quotes, hyphens and a leading "the"."""
    mine, theirs = _unwrapped(answer), _unwrapped(gold)
    if not (_WORD.search(mine) and _WORD.search(theirs)) or "\\" in mine + theirs:
        return mine == theirs
    return _words(mine) == _words(theirs)


def _words(text: str) -> str:
    text = re.sub(r"[\"'`.!?]", "", text).casefold().strip()
    return re.sub(r"[\s\-_]+", "", re.sub(r"^(?:the|an?) ", "", text))
