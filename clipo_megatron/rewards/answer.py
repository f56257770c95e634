"""Finds the final answer of a response, and tells which sources ask multiple-choice questions.

Every mode judges the final answer only; a correct number in the reasoning does not count.
"""

from __future__ import annotations

import re


class UnknownGraderError(ValueError):
    """There is no grader for a mode or a data source: a mistake in the configuration, not in an answer."""


_CHOICE_SOURCES = ("truthfulqa", "mmlu", "commonsense_qa")
_BARE_BOX = re.compile(r"\\boxed\s+(\\?\w+)")


def is_choice_source(data_source: str) -> bool:
    """Whether `data_source` names a multiple-choice set (TruthfulQA, any MMLU, CommonsenseQA)."""
    name = data_source.lower()
    return any(source in name for source in _CHOICE_SOURCES)


def after_thinking(response: str) -> str:
    """The text after the last `</think>`; the whole response when there is none."""
    return response.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` in `text`, braces balanced; None when there is none or it never closes.

    `\boxed 9`, without braces, counts as 9: two worked solutions of MATH end that way.
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    opening = start + len("\\boxed")
    if not text.startswith("{", opening):
        bare = _BARE_BOX.match(text, start)
        return bare.group(1) if bare else None
    depth = 0
    for brace in re.finditer(r"[{}]", text[opening:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[opening + 1 : opening + brace.start()]
    return None


def gold_answer(ground_truth: str) -> str:
    r"""The gold answer: the last `\boxed{}` of a worked solution, else the whole ground truth."""
    boxed = last_boxed(ground_truth)
    return ground_truth if boxed is None else boxed
