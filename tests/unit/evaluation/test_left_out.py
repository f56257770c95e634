"""Problems that were not asked because they are too long: the result keeps their number, and says it."""

import json

from clipo_megatron.evaluation.results import Evaluation, ProblemResult, as_json, read_result, write_result
from clipo_megatron.evaluation.tables import left_out_lines, summary_line

RESULT = Evaluation(3, {"exam/0": ProblemResult(1, 1), "exam/4": ProblemResult(1, 0)}, left_out={"exam": 3, "long": 2})


def test_the_file_keeps_how_many_were_left_out(tmp_path):
    write_result(tmp_path / "r.json", RESULT)
    assert json.loads((tmp_path / "r.json").read_text())["left_out"] == {"exam": 3, "long": 2}
    assert read_result(tmp_path / "r.json") == RESULT and RESULT.of(["exam"]).left_out == {"exam": 3}


def test_a_file_of_before_counts_none(tmp_path):
    facts = as_json(RESULT)
    del facts["left_out"]
    (tmp_path / "r.json").write_text(json.dumps(facts))
    assert read_result(tmp_path / "r.json").left_out == {}


def test_it_is_said():
    assert left_out_lines(RESULT) == [
        "exam: 3 of 5 problems have prompts of more than data.max_prompt_tokens tokens and were not asked; the figures "
        "are of the others",
        "long: 2 of 2 problems have prompts of more than data.max_prompt_tokens tokens and were not asked; it has no "
        "figures",
    ]
    assert "(5 more are too long and were not asked)" in summary_line(RESULT)
    assert left_out_lines(Evaluation(0, {})) == []
