r"""Mathematical equality: an answer is correct if it is equal to the gold answer, however it is written.

Only the final answer counts, in the form that the prompt asks for (`final_answer.py`): the last `\boxed{}` where that
is not known. A response that does not state one is wrong, even when its text contains the correct number: accepting
numbers from prose would reward lists of candidates. Several values in one box ("1 or 2") are a set, which equals only
an equal set.

Integers are compared exactly, other numbers relative to their size, formulas by their values (`closeness.py`); a set is
neither an ordered pair nor an interval (`equality.py`). Where the gold answer is an option of the question, the answer
has to name it (`choice.py`).
"""

from __future__ import annotations

from typing import Any

from clipo_megatron.data.asked import NOTHING, Asked
from clipo_megatron.rewards import choice
from clipo_megatron.rewards.answer import is_choice_source
from clipo_megatron.rewards.equality import answers_agree
from clipo_megatron.rewards.final_answer import gold_answer, stated_answers


def grade(response: str, ground_truth: str, *, data_source: str, extra: Any = None, asked: Asked = NOTHING) -> float:
    """1.0 if the final answer of `response` equals the gold answer, else 0.0. `extra` is not used.

    Raises:
        MemoryError: the answer exhausted the process; the caller counts it as ungraded.
    """
    gold = gold_answer(ground_truth)
    return float(
        any(agree(answer, gold, data_source=data_source, asked=asked) for answer in stated_answers(response, asked))
    )


def agree(answer: str, gold: str, *, data_source: str = "", asked: Asked = NOTHING) -> bool:
    """Whether the final answer `answer` equals `gold`, as an option of the question or as mathematics."""
    if not answer.strip() or len(answer) > 2000 + 4 * len(gold):  # longer than any form of the gold answer
        return False
    if is_choice_source(data_source):
        return choice.agree(answer, gold, asked.options)
    if choice.is_choice(gold, asked.options):
        if choice.agree(answer, gold, asked.options):
            return True
        if asked.options and choice.chosen_label(answer) in asked.options:
            return False  # another option, whose text may be equal
    return answers_agree(answer, gold)
