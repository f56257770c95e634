r"""Whether rows can be graded: their prompts ask for a form that the mode reads, and their gold answers are answers.

The proof is a verdict: the gold answer, stated in the form that the prompt asks for, has to earn 1.0. Rows that fail it
would be wrong for ever, without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from clipo_megatron.data.asked import Asked
from clipo_megatron.rewards import choice
from clipo_megatron.rewards.answer import UnknownGraderError
from clipo_megatron.rewards.final_answer import gold_answer
from clipo_megatron.rewards.modes import judge, mode_for
from clipo_megatron.rewards.number import last_number

BOX_SUFFIX = "\\nPut your final answer within \\\\boxed{}."  # as YAML writes it
_GRADED_ELSEWHERE = {  # parts of names of public sets whose answers are programs or texts
    *("codecontests", "contests", "apps", "taco", "codeforces", "livecodebench", "humaneval", "mbpp", "leetcode"),
    *("kodcode", "swebench", "bigcodebench", "ifeval", "bfcl", "primeintellect-code", "eurus-code", "codeforce"),
}
_CODE = re.compile(
    r"^\s*(?:def \w+\(|class \w+[:(]|import \w|from \w+ import |#include|assert |function \w+\(|public \w|```|SELECT )",
    re.MULTILINE,
)
_MOST_WORDS = 60


def why_not_gradable(
    ground_truth: str, *, data_source: str, mode: str, asked: Asked, extra: Mapping[str, Any] | None = None
) -> str | None:
    """Why a row cannot be graded, and the remedy, as one or two sentences; None where it can.

    Args:
        ground_truth: the row's.
        data_source: the row's.
        mode: the grading mode of its data source; "auto" chooses one.
        asked: what its prompt asks for.
        extra: the reasoning-gym entry.
    """
    chosen = mode == "auto"
    mode = mode_for(data_source) if chosen else mode
    if mode == "reasoning_gym":
        return _why_scorer_fails(ground_truth, data_source, extra)
    remedy = (
        f"Leave these rows out, or choose a mode for {data_source!r} in reward.by_source (docs/extending.md adds one)"
    )
    if chosen and _GRADED_ELSEWHERE & set(re.split(r"[/_\s]|-(?!code)", data_source.lower())):
        return f"there is no grader for data source {data_source!r}, whose answers are programs or texts. {remedy}"
    if (kind := why_no_short_answer(ground_truth)) is not None:
        return f"its ground truth is {kind}, which mode {mode} cannot grade. {remedy}"
    if mode == "number":
        if last_number(f"={gold_answer(ground_truth)}") is None:
            return f"its ground truth {_cut(ground_truth)} holds no number, and mode number compares numbers. {remedy}"
        return None
    return _why_form_is_wrong(mode, asked) or _why_verdict_is_wrong(ground_truth, data_source, mode, asked, extra)


def why_no_short_answer(ground_truth: str) -> str | None:
    """What a ground truth is that is no short answer: tests, code or prose; None where it is one."""
    text = ground_truth.strip()
    if text[:1] in ("{", "[") and text[-1:] in ("}", "]"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return f"a JSON object with {', '.join(map(repr, list(found)[:3])) or 'nothing'}"
        if isinstance(found, list) and any(isinstance(each, (str, dict)) for each in found):
            return "a JSON list, where the answer itself is wanted"
    if _CODE.search(text) and "\\boxed" not in text:
        return "program code"
    answer = gold_answer(ground_truth)
    if len(answer.split()) > _MOST_WORDS and "\\begin" not in answer:
        return f"a text of {len(answer.split())} words without a \\boxed{{}}"
    return None


def stated(answer: str, form: str, *, thinking: bool = False) -> str:
    """A response that states `answer` in a form."""
    said = {
        "boxed": f"\\boxed{{{answer}}}",
        "hashes": f"#### {answer}",
        "line": f"Answer: {answer}",
        "sentence": f"The final answer is {answer}",
    }.get(form, f"{form}{answer}</{form.strip('<>')}>")
    return f"</think>\n{said}" if thinking else said


def _why_form_is_wrong(mode: str, asked: Asked) -> str | None:
    if mode == "reference" and "boxed" not in asked.forms:
        return (
            "its prompt does not ask for \\boxed{}, the only form that mode reference reads. "
            f'Set the source\'s suffix, for example to "{BOX_SUFFIX}"'
        )
    if not asked.forms:
        return (
            f"its prompt asks for no form of the answer that mode {mode} reads, so every response would be wrong. "
            f'Set the source\'s suffix, for example to "{BOX_SUFFIX}", or model.system_prompt; "####", "Answer:" and '
            "<answer> tags are read as well. Where answers are numbers, reward.mode=number needs none of them"
        )
    return None


def _why_verdict_is_wrong(
    ground_truth: str, data_source: str, mode: str, asked: Asked, extra: Mapping[str, Any] | None
) -> str | None:
    answer = gold_answer(ground_truth)
    if mode == "choice" and not asked.options and not choice.is_choice(answer, {}):
        return None  # compared as text
    form = "boxed" if mode == "reference" else asked.forms[0]
    response = stated(answer, form, thinking=asked.thinking)
    try:
        if judge(response, ground_truth, data_source=data_source, mode=mode, asked=asked, extra=extra) == 1.0:
            return None
        reason = "is not found right"
    except Exception as error:  # of a grader, on a ground truth that it cannot read
        reason = f"makes the grader fail ({type(error).__name__}: {str(error)[:80]})"
    return (
        f"its gold answer {_cut(answer)}, stated as {_cut(response)}, {reason} by mode {mode}. Correct the ground "
        f"truth or the prompt, or choose another mode for {data_source!r} in reward.by_source"
    )


def _why_scorer_fails(ground_truth: str, data_source: str, extra: Mapping[str, Any] | None) -> str | None:
    """Why a data set's scorer, which reads any text, judges no answer to a row: every response would be ungraded."""
    response = f"<answer>{ground_truth}</answer>"
    try:
        judge(response, ground_truth, data_source=data_source, mode="reasoning_gym", extra=extra)
    except UnknownGraderError:
        return None  # which is said of the source as a whole
    except Exception as error:
        return (
            f"its gold answer {_cut(ground_truth)} makes the scorer of {data_source!r} fail ({type(error).__name__}: "
            f"{str(error)[:80]}). Most scorers need the generator's entry in extra_info, with its metadata"
        )
    return None


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
