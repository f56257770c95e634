"""The grading modes by name, and the choice among them by data source."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from clipo_megatron.data.asked import NOTHING, Asked
from clipo_megatron.rewards import choice, math, number, reasoning_gym, reference
from clipo_megatron.rewards.answer import UnknownGraderError, is_choice_source

_GRADERS = {
    "math": math.grade,
    "reference": reference.grade,
    "choice": choice.grade,
    "number": number.grade,
    "reasoning_gym": reasoning_gym.grade,
}
MODES = ("auto", *_GRADERS)
_log = logging.getLogger(__name__)


def mode_for(data_source: str) -> str:
    """The mode that `auto` stands for.

    `reasoning_gym` for "reasoning_gym/*", `number` for "arithmetic*", `choice` for multiple-choice sets, else `math`.
    """
    if data_source.startswith(reasoning_gym.PREFIX):
        return "reasoning_gym"
    if data_source.startswith("arithmetic"):
        return "number"
    return "choice" if is_choice_source(data_source) else "math"


def judge(
    response: str,
    ground_truth: str,
    *,
    data_source: str,
    mode: str = "math",
    extra: Mapping[str, Any] | None = None,
    asked: Asked = NOTHING,
) -> float:
    """1.0 for a correct response, 0.0 for a wrong one; exceptions of the grader are passed on.

    Raises:
        UnknownGraderError: `mode` is unknown, or `data_source` names no reasoning-gym data set.
        Exception: the grader failed on this answer.
    """
    if mode == "auto":
        mode = mode_for(data_source)
    if mode not in _GRADERS:
        raise UnknownGraderError(f"grader mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    return _GRADERS[mode](response, ground_truth, data_source=data_source, extra=extra, asked=asked)


def grade(
    response: str,
    ground_truth: str,
    *,
    data_source: str = "",
    mode: str = "auto",
    extra: Mapping[str, Any] | None = None,
    prompt: str | Sequence[Mapping[str, Any]] | None = None,
) -> float | None:
    """Judge the final answer of one response, in this process and without a deadline.

    A hostile answer can keep SymPy busy for hours or exhaust the memory; `GraderPool` judges the same way in
    processes that it kills.

    Args:
        response: the model's text.
        ground_truth: the gold answer, or a worked solution that ends with it, in `\\boxed{}` or after `####`.
        data_source: the row's source, such as "openai/gsm8k"; it tells which sets are multiple choice, and the data set
            for mode "reasoning_gym".
        mode: "math", "reference", "choice", "number", "reasoning_gym", or "auto" to choose by `data_source`, as a run
            does: "math" where it names no other.
        extra: the reasoning-gym entry, for that mode.
        prompt: the prompt's text or chat turns. They tell in which form the answer was asked for, the options of a
            multiple-choice question, and whether the text ends with an open `<think>`.

    Returns:
        1.0 correct, 0.0 wrong, None ungraded: the grader failed on this answer, and logged why.

    Raises:
        UnknownGraderError: `mode` is unknown, or `data_source` names no reasoning-gym data set.
    """
    if prompt is None:
        asked = NOTHING
    else:
        asked = Asked.by_prompt(prompt) if isinstance(prompt, str) else Asked.by_turns(prompt)
    try:
        return judge(response, ground_truth, data_source=data_source, mode=mode, extra=extra, asked=asked)
    except UnknownGraderError:
        raise
    except Exception as error:
        _log.warning("ungraded: %s", describe(error))
        return None


def describe(error: BaseException) -> str:
    """One line of at most 200 characters: the exception's type and message."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
