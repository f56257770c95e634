r"""Keys of answers for majority votes: equal where cheap rules of the grader find two answers equal.

    "... so \boxed{\frac12}"   and   "\boxed{1/2}"        reference, math: the benchmark's string rules make them equal
    "\boxed{(C)}"              and   "\boxed{c}"          choice
    "That is $1,350."          and   "\boxed{1350.0}"     number

No algebra is done: (x+1)^2 and x^2+2x+1 are two answers. Only wrong answers need a key; correct ones agree by verdict.
"""

from __future__ import annotations

import re
from fractions import Fraction

from clipo_megatron.data.asked import NOTHING, Asked
from clipo_megatron.rewards import choice, number, reasoning_gym, reference
from clipo_megatron.rewards.answer import after_thinking, is_choice_source, last_boxed
from clipo_megatron.rewards.final_answer import stated_answers
from clipo_megatron.rewards.modes import mode_for

_LONGEST = 500  # characters; a longer answer agrees only with exact repetitions
_PLAIN_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?")


def answer_key(response: str, *, data_source: str, mode: str, asked: Asked = NOTHING) -> str | None:
    """A text that is equal for equal answers; None where the response gives no answer.

    Args:
        response: the model's text.
        data_source: data source of the problem.
        mode: grading mode.
        asked: what the prompt asks for.
    """
    if mode == "auto":
        mode = mode_for(data_source)
    if mode == "number":
        value = number.final_number(response, thinking=asked.thinking)
        return None if value is None else str(value)
    if mode == "reasoning_gym":
        answer = reasoning_gym.final_text(response, thinking=asked.thinking)
        return answer.removesuffix(".").rstrip() or None
    if mode == "reference":
        answer = (last_boxed(after_thinking(response)) or "").strip()
    else:
        answer = "".join(stated_answers(response, asked)[-1:]).strip()
    if not answer or len(answer) > _LONGEST:
        return answer or None
    if mode == "choice" or is_choice_source(data_source) or (asked.options and mode == "math"):
        return choice.named_option(answer, asked.options) or answer.casefold()
    form = reference.benchmark_form(answer).replace(",\\!", ",")
    plain = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", form)
    return str(Fraction(plain)) if _PLAIN_NUMBER.fullmatch(plain) else form
