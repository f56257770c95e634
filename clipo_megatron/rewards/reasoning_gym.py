"""Grades answers to problems of reasoning-gym by the data set that made them, or as it does (`gym_scorers.py`).

The answer is the content of the last `<answer>...</answer>`, else of the last `\\boxed{}`, else the whole text after
the last `</think>`, stripped. It is scored with and without a final period, and the better score counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from clipo_megatron.data.asked import NOTHING, Asked
from clipo_megatron.data.generators import factory_with
from clipo_megatron.rewards.answer import UnknownGraderError
from clipo_megatron.rewards.final_answer import box_or_text, last_tagged
from clipo_megatron.rewards.gym_scorers import SCORERS, Scorer, evaluator_in, is_possible

PREFIX = "reasoning_gym/"
_FULL_SCORE = 1.0 - 1e-9  # scores are sums of floats in some data sets


def grade(
    response: str,
    ground_truth: str,
    *,
    data_source: str,
    extra: Mapping[str, Any] | None = None,
    asked: Asked = NOTHING,
) -> float:
    """1.0 if the data set gives the answer its full score, and the answer is none that fools its scorer; else 0.0.

    Args:
        response: what the model wrote.
        ground_truth: the entry's "answer"; used where `extra` has none.
        data_source: "reasoning_gym/<data set>".
        extra: the generator's entry ("question", "answer", "metadata"); most data sets need only the answer.
        asked: whether the prompt opened the thinking.

    Raises:
        UnknownGraderError: `data_source` names no data set of reasoning-gym, or one that evaluates answers as code.
    """
    name = data_source.removeprefix(PREFIX)
    score = _scorer(name)
    entry = {"answer": ground_truth, "metadata": {}, **(extra or {})}
    answer = final_text(response, thinking=asked.thinking)
    gold = str(entry["answer"])
    candidates = {each for each in (answer, answer.removesuffix(".").rstrip()) if is_possible(name, each, gold)}
    # JSON turned the tuples of some entries (grids) into lists; the data set compares them as tuples.
    entries = (entry, {**entry, "metadata": _tuples(entry["metadata"])})
    return float(any(score(c, e) >= _FULL_SCORE for c in candidates for e in entries))


def final_text(response: str, *, thinking: bool = False) -> str:
    """The final answer as text (see the module's docstring); `thinking`: whether the prompt opened the thinking."""
    boxed, said = box_or_text(response, thinking=thinking)
    if tagged := last_tagged(said, "answer"):
        return tagged[1].strip()
    return (said if boxed is None else boxed).strip()


def known_name(name: str) -> bool:
    """Whether reasoning-gym has a data set of this name."""
    return name in factory_with(name).DATASETS


@cache
def _scorer(name: str) -> Scorer:
    factory = factory_with(name)
    if name not in factory.DATASETS:
        raise UnknownGraderError(
            f"data source {PREFIX + name!r}: reasoning-gym has no data set {name!r}; "
            f"write '{PREFIX}<name>' with one of its {len(factory.DATASETS)} names, for instance '{PREFIX}chain_sum'"
        )
    if name in SCORERS:
        return SCORERS[name]
    scorer = factory.get_score_answer_fn(name)
    if (evaluator := evaluator_in(scorer)) is not None:
        raise UnknownGraderError(
            f"data source {PREFIX + name!r}: the scorer of this data set uses {evaluator}, which can run an answer as "
            "code; leave its rows out, or choose another mode for them in reward.by_source"
        )
    return scorer


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item) for item in value)
    return value
