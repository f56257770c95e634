"""Answers that each grading mode accepts and refuses, and the behaviour of the public `grade`."""

import json
import subprocess
import sys

import pytest

from clipo_megatron.rewards import MODES, grade, mode_for

MATH_EQUAL = [
    ("\\frac{2}{4}", "1/2"),
    ("6/2", "3"),
    ("2^{10}", "1024"),
    ("\\{1,2\\}", "2,1"),
    ("{1,2}", "2,1"),
    ("2,1", "\\{1,2\\}"),
    ("\\text{C}", "C"),
    ("(C)", "C"),
    ("32.5\\%", "32.5"),
    ("50\\%", "0.5"),
    ("1/3", "0.333333"),
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x=5", "5"),
    ("y=2x+3", "2x+3"),
    ("x \\in (1,2)", "(1,2)"),
    ("1\\frac{1}{2}", "\\frac{3}{2}"),
    ("5 dollars", "5"),
    ("5 apples", "5"),
    ("5\\text{ million dollars}", "5000000"),
    ("3 million", "3,000,000"),
    ("5~\\text{km}", "5"),
    ("5 \\text{ or } 6", "5 \\text{ or } 6"),
    ("\\frac{1}{42}.", "\\frac{1}{42}"),
    ("0.0000672", ".0000672"),
    ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
]
MATH_DIFFERENT = [
    ("", "5"),
    (" ", "5"),
    ("6", "5"),
    ("1,2", "12"),
    ("12", "1,2"),
    ("1 or 2", "1"),
    ("1, 2", "2"),
    ("1;2", "1"),
    ("1 \\text{ or } 2", "2"),
    ("x=3 \\text{ or } x=4", "4"),
    ("0.5", "50"),
    ("(2,1)", "(1,2)"),
    ("1,2", "(2,1)"),
    ("\\{1,2\\}", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("0.000067", "0.0000672"),
    ("0.0000003", "0.00000035"),
    ("5\\text{ or }6", "5"),
    ("5\\text{ and }6", "5"),
    ("5\\text{ million}", "5"),
    ("204_6", "204_5"),
    ("10.001", "10"),
    ("x", "y"),
    ("5+x", "5"),
    ("\\text{June 21}", "\\text{June 20}"),
    ("\\emptyset", "0"),
    ("3.5", "(3,5)"),
]


@pytest.mark.parametrize(("answer", "gold"), MATH_EQUAL)
def test_math_accepts_equal_answers(answer, gold):
    assert grade(f"\\boxed{{{answer}}}", gold, data_source="math") == 1.0


@pytest.mark.parametrize(("answer", "gold"), MATH_DIFFERENT)
def test_math_refuses_other_answers(answer, gold):
    assert grade(f"\\boxed{{{answer}}}", gold, data_source="math") == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "The answer is 5.",
        "5",
        "\\boxed{6}, not 5",
        "\\boxed{5} or rather \\boxed{6}",
        "<think>\\boxed{5}</think> 5",
        "",
    ],
)
def test_math_judges_the_final_answer_only(response):
    assert grade(response, "5", data_source="math") == 0.0


CHOICES = [
    ("C", 1.0),
    ("(C)", 1.0),
    ("c", 1.0),
    ("C.", 1.0),
    ("\\text{C}", 1.0),
    ("\\textbf{(C)}", 1.0),
    ("\\left(C\\right)", 1.0),
    ("$C$", 1.0),
    ("C. some text about A.", 1.0),
    ("C) some text", 1.0),
    ("C: some text", 1.0),
    ("\\text{C. some text}", 1.0),
    ("B", 0.0),
    ("B. not C.", 0.0),
    ("C or D", 0.0),
    ("CD", 0.0),
    ("Cats", 0.0),
    ("A C", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("answer", "expected"), CHOICES)
@pytest.mark.parametrize("mode", ["choice", "math", "auto"])
def test_choice_reads_the_label(answer, expected, mode):
    assert grade(f"\\boxed{{{answer}}}", "C", data_source="conrl/mmlu2k", mode=mode) == expected


def test_choice_without_a_box_is_wrong():
    assert grade("The answer is C", "C", data_source="conrl/truthfulqa", mode="choice") == 0.0


@pytest.mark.parametrize("name", ["basic_arithmetic", "chain_sum", "gsm_symbolic", "countdown", "rearc"])
def test_reasoning_gym_scores_its_own_entries(name):
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(name, size=5, seed=3):
        entry = json.loads(json.dumps(entry))  # as it comes from a file, or reaches a worker
        gold = entry["metadata"]["expression"] if name == "countdown" else entry["answer"]

        def verdict(response, entry=entry):
            return grade(
                response, entry["answer"], data_source=f"reasoning_gym/{name}", mode="reasoning_gym", extra=entry
            )

        assert verdict(gold) == 1.0
        assert verdict(f"<think>hm</think> \n{gold} ") == 1.0
        assert verdict(f"I think <answer> {gold}\n</answer>.") == 1.0
        assert verdict(f"<answer>7777777</answer> no: <answer>{gold}</answer>") == 1.0
        assert verdict(f"<answer>{gold}</answer> no: <answer>7777777</answer>") == 0.0
        assert verdict("") == 0.0
        assert verdict("7777777") == 0.0
        if name != "rearc":
            assert verdict(f"So \\boxed{{{gold}}}.") == 1.0
            assert verdict(f"{gold}.") == 1.0


def test_reasoning_gym_needs_only_the_answer_for_most_data_sets():
    assert grade("7", "7", data_source="reasoning_gym/chain_sum", mode="auto") == 1.0
    assert grade("8", "7", data_source="reasoning_gym/chain_sum", mode="auto") == 0.0
    assert grade("+07.0", "7", data_source="reasoning_gym/chain_sum", mode="auto") == 1.0


def test_auto_chooses_by_data_source():
    assert mode_for("reasoning_gym/chain_sum") == "reasoning_gym"
    assert mode_for("conrl/truthfulqa") == mode_for("cais/MMLU") == "choice"
    assert mode_for("openai/gsm8k") == "math"


def test_unknown_modes_and_data_sets_are_named():
    with pytest.raises(ValueError, match="'maths' is unknown; choose one of auto, math"):
        grade("\\boxed{1}", "1", data_source="x", mode="maths")
    with pytest.raises(ValueError, match="no data set 'chain_some'"):
        grade("1", "1", data_source="reasoning_gym/chain_some", mode="auto")


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("auto", "reasoning_gym")])
@pytest.mark.parametrize("text", ["\x00", "\ud800", "}{", "\\", "\\boxed", "\\frac", "𝟛", "((((", "1e999", "1/0", "="])
def test_odd_text_gets_a_verdict(mode, text):
    for source in ("math", "mmlu"):
        assert grade(f"\\boxed{{{text}}}", "7", data_source=source, mode=mode) == 0.0
        assert grade("\\boxed{7}", text, data_source=source, mode=mode) == 0.0


def test_a_grader_that_raises_leaves_the_answer_ungraded(caplog):
    without_entry = None  # word_ladder scores with the entry's metadata
    verdict = grade("COLD,CORD", "COLD", data_source="reasoning_gym/word_ladder", mode="auto", extra=without_entry)
    assert verdict is None
    assert "ungraded" in caplog.text


def test_importing_and_grading_needs_neither_torch_nor_megatron():
    script = (
        "import sys, time; begun = time.time(); import clipo_megatron.rewards as rewards; "
        "heavy = {'torch', 'megatron', 'sympy', 'math_verify', 'reasoning_gym'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "assert rewards.grade(r'\\boxed{6/2}', '3', data_source='x') == 1.0; "
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
