r"""Multiple choice: C, (C), c, "C.", \text{C}, \textbf{(C)}, "C. some text" and "C) some text" all choose C.

The choice is the last `\boxed{}` after the last `</think>`; a response without a box is wrong. "A or B" names
no option.
"""

from __future__ import annotations

import re
from typing import Any

from clipo_megatron.rewards.answer import after_thinking, gold_answer, last_boxed

_WRAPPER = re.compile(r"^\\(?:text|textbf|textrm|textit|mathrm|mathbf|bf|rm|boxed)\s*\{(.*)\}$", re.DOTALL)
_LABEL = re.compile(r"^\(\s*([A-Za-z])\s*\)|^([A-Za-z])(?=\s*$|\s*[.:)])")


def grade(response: str, ground_truth: str, *, data_source: str = "", extra: Any = None) -> float:
    """1.0 if the boxed choice is the ground truth's letter, else 0.0. `data_source` and `extra` are not used."""
    answer = last_boxed(after_thinking(response))
    return float(answer is not None and agree(answer, gold_answer(ground_truth)))


def agree(answer: str, gold: str) -> bool:
    """Whether `answer` and `gold` name the same option. A gold that is no letter is compared as text."""
    wanted = chosen_label(gold)
    if wanted is None:
        return bool(gold.strip()) and _unwrap(answer).casefold() == _unwrap(gold).casefold()
    return chosen_label(answer) == wanted


def chosen_label(text: str) -> str | None:
    """The upper-case letter that `text` starts with as a label; None when it names no option."""
    label = _LABEL.match(_unwrap(text))
    return (label.group(1) or label.group(2)).upper() if label else None


def _unwrap(text: str) -> str:
    text = text.replace("\\left", "").replace("\\right", "").replace("\\ ", " ").replace("\\$", "").replace("$", "")
    text = text.strip()
    while wrapped := _WRAPPER.match(text):
        text = wrapped.group(1).strip()
    # \text{C. } followed by text: only its content matters
    return re.sub(r"^\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text).strip()
