"""Keys of answers for majority votes."""

import pytest

from clipo_megatron.rewards import grade
from clipo_megatron.rewards.voting import answer_key

SAME = [
    ("math", "math", ["\\boxed{\\frac12}", "so \\boxed{1/2}", "\\boxed{\\dfrac{1}{2}}"]),
    ("math", "math", ["\\boxed{1,350}", "\\boxed{1350}", "\\boxed{1350.0}", "\\boxed{1,\\!350}", "\\boxed{\\$1350}"]),
    ("reference", "math", ["\\boxed{x=5}", "\\boxed{5}", "<think>\\boxed{6}</think> \\boxed{ 5 }", "\\boxed{5\\%}"]),
    ("choice", "mmlu", ["\\boxed{(C)}", "\\boxed{c}", "\\boxed{C. Paris}", "\\boxed{\\text{C}}"]),
    ("math", "conrl/truthfulqa", ["\\boxed{(C)}", "\\boxed{c}"]),
    ("number", "arithmetic", ["That is $1,350.", "\\boxed{1350.0}", "1350"]),
    ("auto", "arithmetic/x", ["7/2", "3.5"]),
    ("reasoning_gym", "reasoning_gym/gcd", ["<answer>5</answer>", "\\boxed{5}", "5.", " 5 "]),
]
DIFFERENT = [
    ("math", "math", ["\\boxed{5}", "\\boxed{6}", "\\boxed{-5}", "\\boxed{x}", "\\boxed{5,6}", "\\boxed{1.5}"]),
    ("choice", "mmlu", ["\\boxed{A}", "\\boxed{B}", "\\boxed{A or B}"]),
    ("number", "arithmetic", ["5", "-5", "0.5"]),
    ("reasoning_gym", "reasoning_gym/gcd", ["<answer>5</answer>", "6"]),
]


@pytest.mark.parametrize(("mode", "source", "responses"), SAME)
def test_one_answer_is_one_key(mode, source, responses):
    keys = {answer_key(response, data_source=source, mode=mode) for response in responses}
    assert len(keys) == 1 and None not in keys


@pytest.mark.parametrize(("mode", "source", "responses"), DIFFERENT)
def test_two_answers_are_two_keys(mode, source, responses):
    assert len({answer_key(response, data_source=source, mode=mode) for response in responses}) == len(responses)


@pytest.mark.parametrize(("mode", "source", "responses"), [row for row in SAME if row[0] != "reasoning_gym"])
def test_responses_with_one_key_have_one_verdict(mode, source, responses):
    """The most lenient mode accepts each response with another one's answer as the gold answer."""
    kind = {"reference": "math"}.get(mode, mode)
    verdicts = {grade(response, responses[1], data_source=source, mode=kind) for response in responses}
    assert verdicts == {1.0}


@pytest.mark.parametrize(
    ("mode", "response"),
    [
        ("math", "no box"),
        ("math", "\\boxed{ }"),
        ("number", "none"),
        ("choice", ""),
        ("reasoning_gym", "<think>a</think>"),
    ],
)
def test_a_response_without_an_answer_has_no_key(mode, response):
    assert answer_key(response, data_source="x", mode=mode) is None


def test_keys_of_hostile_answers_are_cheap():
    for text in ("9" * 100_000, "1e999999999", "\\frac" * 50_000, "{" * 100_000, "(" * 5_000 + ")" * 5_000):
        for mode in ("math", "reference", "choice", "number"):
            answer_key(f"\\boxed{{{text}}}", data_source="x", mode=mode)
