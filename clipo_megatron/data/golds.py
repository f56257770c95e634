r"""Ground truths that hold no answer: missing values, blanks, empty and open boxes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

AnyProblem = TypeVar("AnyProblem", bound=Any)  # a Row or a Prompt
# What missing values become as text: of Python, JSON, pandas, spreadsheets
_MISSING = {"nan", "none", "null", "n/a", "#n/a", "<na>", "nat", "inf", "+inf", "-inf", "1.#inf", "nil", "-nan", "+nan"}
_MISSING |= {"n.a.", "pd.na", "#value!", "#ref!", "#div/0!", "#num!", "#name?", "float('nan')", "tbd", "todo"}
_BLANK = re.compile(r"[\s$~.,;:?_*\-—–…\u200b\ufeff]*|<(\w+)>\s*</\1>")
_EMPTY = re.compile(r"(?:[\s$~{}]|\\text\s*\{\s*\})*")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BRACE = re.compile(r"[{}]")
_SOLUTION = 80  # characters before the box of a worked solution
_HASHES = re.compile(r"(####|\banswer\s*[:：])\s*$", re.IGNORECASE)


def why_no_answer(truth: str | int | float) -> str | None:
    """Why a ground truth holds no answer; None where it holds one.

    A row of a public set may be a worked solution whose box is empty. It is read, and `without_answer` finds it.
    """
    text = str(truth).strip()
    if _BLANK.fullmatch(text):
        return "it is blank" if not text else f"{text!r} is no answer"
    if text.casefold() in _MISSING:
        return f"{text!r} is a missing value and no answer"
    if "box" in text and (boxes := list(_BOX.finditer(text))):
        return _why_no_box(text, boxes)
    if asks := _HASHES.search(text):
        return f"no answer follows its {asks[1]}"
    return None


def without_answer(problems: Iterable[AnyProblem]) -> tuple[list[AnyProblem], list[AnyProblem]]:
    """The problems that have an answer, and those whose worked solution ends with an empty box."""
    found: tuple[list[AnyProblem], list[AnyProblem]] = ([], [])
    for problem in problems:
        found[_ends_with_empty_box(problem.ground_truth)].append(problem)
    return found


def _ends_with_empty_box(truth: str) -> bool:
    if "boxed" not in truth:
        return False
    contents = [_content(truth, box.end()) for box in _BOX.finditer(truth)]
    return bool(contents) and all(content is not None and _EMPTY.fullmatch(content) for content in contents)


def _why_no_box(text: str, boxes: list[re.Match[str]]) -> str | None:
    contents = [_content(text, box.end()) for box in boxes]
    if contents[-1] is None:
        return "its last \\boxed{ never closes"
    said = [content.strip() for content in contents if content and not _EMPTY.fullmatch(content)]
    if not said:
        return None if boxes[-1].start() > _SOLUTION else "its \\boxed{} is empty"
    if said[-1].casefold() in _MISSING:
        return f"{said[-1]!r} in its box is a missing value and no answer"
    return None


def _content(text: str, opening: int) -> str | None:
    """What the braces that open at `opening` hold; None if they never close."""
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[opening + 1 : brace.start()]
    return None
