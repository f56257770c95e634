"""Mode `number`: which texts are read as a number, and which are not."""

import time
from fractions import Fraction

import pytest
from grading import grade_many

from clipo_megatron.config.schema import GraderMode, RewardConfig
from clipo_megatron.rewards import GraderPool, grade, mode_for
from clipo_megatron.rewards.number import last_number
from clipo_megatron.rewards.pool import Answer

READ = [
    ("5", 5),
    ("The answer is 5.", 5),
    ("The answer is 5!", 5),
    ("5.0", 5),
    ("I had 3, then 4.", 4),
    ("#### 1,234,567", 1234567),
    ("12,345.50 dollars", Fraction(24691, 2)),
    ("1{,}000", 1000),
    ("1\\,000", 1000),
    ("1,\\!000", 1000),
    ("1,2,3", 3),
    ("1,2345", 2345),
    (".5", Fraction(1, 2)),
    ("so...5", 5),
    ("No.5", 5),
    ("version 3.5.2", Fraction(7, 2)),
    ("-5", -5),
    ("−5", -5),
    ("+5", 5),
    ("$-5$", -5),
    ("-$5", -5),
    ("-\\$5.25", Fraction(-21, 4)),
    ("x=-5", -5),
    ("x = - 5", -5),
    ("(-5)", -5),
    ("3 - 5", 5),
    ("3 - 5 = -2", -2),
    ("9-7", 7),
    ("x-7", 7),
    ("(1)-7", 7),
    ("pages 10-12", 12),
    ("it fell to -7", -7),
    ("Left:\n- 7 apples", 7),
    ("50%", 50),
    ("50\\%", 50),
    ("$50", 50),
    ("90^\\circ", 90),
    ("90^{\\circ}", 90),
    ("90°", 90),
    ("25 cm^2", 25),
    ("25 m s^{-1}", 25),
    ("x_1 = 4, and 9 = x_{12}", 9),
    ("\\log_2 8 = 3", 3),
    ("42 mL of H2O", 42),
    ("5kg", 5),
    ("5th", 5),
    ("\\approx5", 5),
    ("\\text{5}", 5),
    ("3/4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("\\frac{3}{4}", Fraction(3, 4)),
    ("-\\dfrac{3}{4}", Fraction(-3, 4)),
    ("\\frac{-3}{4}", Fraction(-3, 4)),
    ("\\frac34", Fraction(3, 4)),
    ("1 1/2", Fraction(3, 2)),
    ("-1 1/2", Fraction(-3, 2)),
    ("1\\frac{1}{2}", Fraction(3, 2)),
    ("48/2 = 24", 24),
    ("1.5e3", 1500),
    ("2E-2", Fraction(1, 50)),
    ("\\sqrt{16} = 4", 4),
    ("2^{10} = 1024", 1024),
]
NOT_READ = [
    "",
    "five",
    "forty-two",
    "no number",
    "²",
    "𝟛",
    "٣",
    "x2",
    "1/0",
    "\\sqrt{2}",
    "\\sqrt[3]{8}",
    "5\\sqrt{2}",
    "√2",
    "3\\pi",
    "3π",
    "2^{10}",
    "2^10",
    "2**10",
    "\\frac{x}{2}",
    "\\frac{\\pi}{2}",
    "5 million",
    "1e999999999",
    "9" * 5000,
]


@pytest.mark.parametrize(("text", "value"), READ)
def test_a_number_is_read(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize("text", NOT_READ)
def test_other_texts_are_not_read_as_a_number(text):
    assert last_number(text) is None


RIGHT = [
    ("She pays 3 * $450 = $1,350.", "1350"),
    ("72", "72.0"),
    ("72.00", "72"),
    ("-0", "0"),
    ("0.1", "1/10"),
    ("</think> 18", "18"),
    ("<think>3</think> 18", "18"),
    ("a \\boxed{18} of 20", "18"),
    ("\\boxed{3} no, \\boxed{18}", "18"),
    ("\\boxed{- 18}", "-18"),
    ("\\boxed{\\$18.00}", "18"),
    ("\\boxed{18\\text{ apples}}", "18"),
    ("\\boxed{x = 18}", "18"),
    ("18", "He has 9*2 = <<9*2=18>>18.\n#### 18"),
    ("18", "1 + 17 = \\boxed{18}, as 20 shows"),
]
WRONG = [
    ("17", "18"),
    ("-18", "18"),
    ("18 or 19", "18"),
    ("18.000000001", "18"),
    ("0.333333", "1/3"),
    ("50%", "0.5"),
    ("<think>18</think>", "18"),
    ("<think>18</think> done", "18"),
    ("18, or rather \\boxed{}", "18"),
    ("18, or rather \\boxed{none}", "18"),
    ("\\boxed{18} but \\boxed{19}", "18"),
    ("eighteen", "18"),
    ("2^{18}", "18"),
    ("\\sqrt{18}", "18"),
    ("18", "eighteen"),
    ("", ""),
    ("nothing", "nothing"),
]


@pytest.mark.parametrize(("response", "gold"), RIGHT)
def test_equal_numbers_are_correct(response, gold):
    assert grade(response, gold, data_source="openai/gsm8k", mode="number") == 1.0


@pytest.mark.parametrize(("response", "gold"), WRONG)
def test_other_numbers_are_wrong(response, gold):
    assert grade(response, gold, data_source="openai/gsm8k", mode="number") == 0.0


def test_auto_chooses_it_for_arithmetic_only():
    assert mode_for("arithmetic") == mode_for("arithmetic/one_digit_sums") == "number"
    assert mode_for("openai/gsm8k") == "math"
    assert grade("so it is 5", "5", data_source="arithmetic/sums", mode="auto") == 1.0
    assert grade("so it is 5", "5", data_source="openai/gsm8k", mode="auto") == 0.0


def test_the_pool_knows_the_mode():
    with GraderPool(RewardConfig(mode=GraderMode.number)) as pool:
        verdicts = grade_many(pool, [Answer("it is 5", "5", "x"), Answer("it is 6", "5", "x")])
    assert [verdict.correct for verdict in verdicts] == [True, False]


@pytest.mark.parametrize(
    "unit",
    [
        "\\a",
        "1^",
        "1^{",
        "1",
        "1,",
        "111,",
        "1 ",
        "1/",
        "1.",
        ".",
        "-",
        "- ",
        "\\frac{1}{",
        "\\sqrt[",
        "\\sqrt{",
        "^{",
        "^",
        "_",
        "{",
        "1e",
        "\\frac",
        "\\",
        "1 1/",
        "$",
        "1\\,111",
        "√",
    ],
)
def test_time_is_linear_in_a_hostile_text(unit):
    text = unit * (1_000_000 // len(unit))
    begun = time.process_time()
    last_number(text)
    assert time.process_time() - begun < 10
