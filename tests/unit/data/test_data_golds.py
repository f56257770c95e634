"""Ground truths that hold no answer are refused with file, row and field."""

import json
import math

import pytest
from test_data_sources import WRITERS, record

from clipo_megatron.config.schema import SourceConfig
from clipo_megatron.data.golds import why_no_answer, without_answer
from clipo_megatron.data.sources import DataError, read

NONE = [
    *("nan", "NaN", "inf", "-inf", "None", "null", "NULL", "N/A", "<NA>", " ", "\n", "$$", "-", "?"),
    *("-nan", "#VALUE!", "#DIV/0!", "float('nan')", "TODO", "…", "**", "Answer:", "<answer> </answer>"),
    *(
        "\\boxed{}",
        "\\boxed{ }",
        "$\\boxed{}$",
        "So it is \\boxed{5",
        "\\boxed{\\frac{1}{2}",
        "\\boxed{nan}",
        "x = 5\n####",
    ),
]
ANSWERS = [
    "0",
    "-5",
    "no",
    "undefined",
    "\\{\\}",
    "[]",
    "\\infty",
    "\\boxed{0}",
    "\\boxed 9",
    "A",
    "\\text{none of these}",
    "Infinity",
    "The answer: 5",
    "<answer>5</answer>",
]


@WRITERS
@pytest.mark.parametrize("truth", NONE)
def test_no_answer_is_refused(tmp_path, write, name, truth):
    source = write(tmp_path / name, [record(), record(answer=truth)])
    with pytest.raises(DataError, match=r"row 1.*field reward_model.ground_truth.*Correct the row"):
        read(source)


@pytest.mark.parametrize("truth", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(tmp_path, truth):
    file = tmp_path / "sums.jsonl"
    file.write_text(json.dumps(record(answer=truth)))  # as NaN and Infinity
    with pytest.raises(DataError, match=r"row 0.*field reward_model.ground_truth: .* is a missing value"):
        read(SourceConfig(path=str(file)))


@pytest.mark.parametrize("truth", ANSWERS)
def test_answers_are_read(truth):
    assert why_no_answer(truth) is None


def test_a_worked_solution_with_an_empty_box_is_read_and_found(tmp_path):
    solution = (
        "Observe that all numbers between n!+1 and n!+n are composite, since k divides n!+k. So there are $\\boxed{}$."
    )
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(record(answer=truth)) + "\n" for truth in ("5", solution)))
    answered, unanswered = without_answer(read(SourceConfig(path=str(file))))
    assert [row.id for row in answered] == ["sums/0"] and [row.id for row in unanswered] == ["sums/1"]
