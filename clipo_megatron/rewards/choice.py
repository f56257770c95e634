r"""Multiple choice: C, (C), c, "C.", \text{C}, **C**, "Option C", "C: some text" and the text of option C choose C.

A question is multiple choice where its prompt lists options, of which the gold answer is one, or where the gold answer
is a letter. "A or B" names no option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from clipo_megatron.data.asked import NOTHING, Asked
from clipo_megatron.rewards.equality import answers_agree
from clipo_megatron.rewards.final_answer import gold_answer, stated_answers
from clipo_megatron.rewards.spelling import plain_spelling

_PREFIX = re.compile(
    r"^(?:(?:the|my)\s+)?(?:(?:correct|final|best|right)\s+)*(?:option|choice|answer|letter|选项|选|答案)"
    r"(?:\s+is|\s*是)?\s*[:：]?\s*",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^(?:[(\[{]|\\\{)\s*([A-Za-z]|[1-9](?=[)\]]))\s*\.?\s*(?:[)\]}]|\\\})"
    r"|^([A-Za-z]|[1-9](?=[):]|\.\s+[^\d\s]))(?=\s*$|\s*[.:)\]](?!\.)|\s+-+\s|\s+\()"
)
_ANOTHER = re.compile(
    r"^\s*(?:[,/&]|or\b|and\b)\s*[(\[]?[A-Za-z][)\]]?(?:\W|$)|\b(?:or|and)\s+[(\[]?[A-Z]\s*[.:)\]]", re.IGNORECASE
)
_WRAPPER = re.compile(r"\\text\s*\{([^{}]*)\}")
_LONE_LETTER = re.compile(r"[(\[]?\s*([A-Z])\s*[)\]]?\.?")
_LETTERS = re.compile(r"[A-Z](?:\s*(?:[,;&]|and)?\s*[A-Z])+")


def grade(
    response: str, ground_truth: str, *, data_source: str = "", extra: Any = None, asked: Asked = NOTHING
) -> float:
    """1.0 if the stated choice is the ground truth's option, else 0.0. `data_source` and `extra` are not used."""
    gold = gold_answer(ground_truth)
    return float(any(agree(answer, gold, asked.options) for answer in stated_answers(response, asked)))


def is_choice(gold: str, options: Mapping[str, str]) -> bool:
    """Whether a gold answer is one of these options, or a letter where the options are not known."""
    if not options:
        return _LONE_LETTER.fullmatch(_unwrap(gold)) is not None
    return _wanted(gold, options) is not None


def agree(answer: str, gold: str, options: Mapping[str, str] | None = None) -> bool:
    """Whether `answer` and `gold` name the same option. A gold that is no option is compared as text."""
    options = options or {}
    if len(answer) > 2000 + 4 * max(map(len, (gold, *options.values()))):  # longer than any form of an option
        return False
    wanted = _wanted(gold, options)
    if wanted is None:
        return bool(gold.strip()) and _unwrap(answer).casefold() == _unwrap(gold).casefold()
    if len(wanted) > 1:
        return _labels(answer) == wanted
    label = chosen_label(answer)
    if label is not None and (not options or label in options):
        return label in wanted
    return _option_with_text(_unwrap(answer), options) in wanted if options else False


def named_option(text: str, options: Mapping[str, str]) -> str | None:
    """The label that `text` states, or whose option it says; None where it names none."""
    return chosen_label(text) or _option_with_text(_unwrap(text), options)


def chosen_label(text: str) -> str | None:
    """The upper-case letter that `text` starts with as a label; None when it names no option."""
    text = _PREFIX.sub("", _unwrap(text))
    found = _LABEL.match(text)
    if found is None or _ANOTHER.search(text[found.end() :]):
        return None
    return (found[1] or found[2]).upper()


def _wanted(gold: str, options: Mapping[str, str]) -> frozenset[str] | None:
    """The labels of the gold answer; None where it is none of the options."""
    text = _unwrap(gold)
    label = chosen_label(text)
    if label is None and options and text in options:
        label = text
    if label is not None and (not options or label in options):
        return frozenset([label])
    if options and _LETTERS.fullmatch(text) and (labels := _labels(text)) and labels <= set(options):
        return labels
    named = _option_with_text(text, options)
    return None if named is None else frozenset([named])


def _labels(text: str) -> frozenset[str] | None:
    """The labels of "A, C", "AC" or "A and C"; None for another text."""
    text = _PREFIX.sub("", _unwrap(text)).replace("(", "").replace(")", "").strip("{}\\ ")
    if not _LETTERS.fullmatch(text):
        return frozenset([label]) if (label := chosen_label(text)) else None
    return frozenset(re.findall(r"[A-Z]", text.replace("and", "")))


def _option_with_text(text: str, options: Mapping[str, str]) -> str | None:
    """The label of the only option that says `text`; None where none or several do."""
    wanted = _squeezed(text)
    if not wanted:
        return None
    found = [label for label, option in options.items() if _squeezed(_unwrap(option)) == wanted]
    if not found and len(text) <= 200:
        found = [label for label, option in options.items() if len(option) <= 200 and answers_agree(text, option)]
    return found[0] if len(found) == 1 else None


def _squeezed(text: str) -> str:
    return re.sub(r"[\s\\{}$*\"'`]+", "", text).rstrip(".").casefold()


def _unwrap(text: str) -> str:
    text = plain_spelling(text)
    while (inner := _WRAPPER.sub(r"\1", text)) != text:
        text = inner
    return re.sub(r"^\{([^{}]*)\}", r"\1", " ".join(text.split()))
