"""Records of public data sets as rows in the verl schema, with the prompts of arXiv 2603.10101.

Each function takes a record as its source publishes it and returns question and ground truth, or None for a record that
cannot be asked as text; `row` makes the row. For MATH the whole solution is the ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."
CHOICE_SUFFIX = "\nLet's think step by step and output the final answer (eg, A, B, C, D, ...) within \\boxed{}."

QuestionAndTruth = tuple[str, str]
Record = Mapping[str, Any]


def row(problem: QuestionAndTruth, *, data_source: str, index: int, split: str, choice: bool = False) -> dict[str, Any]:
    """One row of a data set; `index` is its number there."""
    question, truth = problem
    return {
        "data_source": data_source,
        "prompt": [{"content": question + (CHOICE_SUFFIX if choice else SUFFIX), "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


def grade_school(record: Record) -> QuestionAndTruth:
    """GSM8K and GSM-Symbolic: {question, answer}, the number after "####"."""
    return record["question"], record["answer"].rpartition("####")[2].strip().replace(",", "")


def solved_problem(record: Record) -> QuestionAndTruth:
    """MATH: {problem, solution}; the answer is the last box of the solution."""
    return record["problem"], record["solution"]


def answered_problem(record: Record) -> QuestionAndTruth:
    """MATH-500, AIME, AMC and MATH-Perturb: {problem or question, answer}. Whole numbers lose their ".0"."""
    answer = record["answer"]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return record["problem"] if "problem" in record else record["question"], str(answer)


def theorem(record: Record) -> QuestionAndTruth | None:
    """TheoremQA: {Question, Answer, Picture}; questions about a picture are left out."""
    return None if record.get("Picture") else (record["Question"], str(record["Answer"]))


def options_of_four(record: Record) -> QuestionAndTruth:
    """MMLU: {question, choices, answer}, the answer an index."""
    return with_options(record["question"], record["choices"], record["answer"])


def labelled_options(record: Record) -> QuestionAndTruth:
    """CommonsenseQA: {question, choices {label, text}, answerKey}."""
    choices = record["choices"]
    return with_options(record["question"], choices["text"], list(choices["label"]).index(record["answerKey"]))


def truthful(record: Record) -> QuestionAndTruth:
    """TruthfulQA, multiple_choice: {question, mc1_targets {choices, labels}}.

    The correct choice is published first, so the choices are shuffled, with the question as the seed.
    """
    choices, labels = record["mc1_targets"]["choices"], record["mc1_targets"]["labels"]
    order = list(range(len(choices)))
    Random(record["question"]).shuffle(order)
    return with_options(record["question"], [choices[place] for place in order], order.index(list(labels).index(1)))


def with_options(question: str, options: Any, correct: int) -> QuestionAndTruth:
    """A question with lettered options, and the letter of the option with index `correct`."""
    lines = [f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options)]
    return f"{question}\n\nOptions:\n" + "\n".join(lines), chr(ord("A") + correct)
