r"""Multiple choice, recognised by the gold answer and the options, whatever the set is called."""

import pytest

from clipo_megatron.data.asked import options_of
from clipo_megatron.rewards import grade

QUESTION = "Which temperature?\nA) 1 K\nB) 2 K\nC) 42 K\nD) 3 K\nPut the letter in \\boxed{}."
SOURCES = ["gpqa_diamond", "ai2_arc", "supergpqa", "medqa", "ceval", "agieval", "somebody/unheard-of", "cais/mmlu"]
FORMS = [
    *("C", "c", "C.", "(C)", "[C]", "{C}", "C: 42 K", "C) 42 K", "C. 42 K", "(C) 42 K", "C - 42 K", "**C**"),
    *("C \\text{ (42 K)}", "\\{C\\}"),
    *("Option C", "option (C)", "Choice C", "\\text{C}", "\\mathrm{C}", "\\textbf{(C) }42\\text{ K}", "$C$"),
    *("C\\text{: 42 K}", "\\text{Option C}", "The answer is C", "Answer: C", "\\text{C. 42 K}", "C<|im_end|>"),
]
OTHERS = ["C..E", "B", "(B)", "C or D", "C, D", "CD", "Cats", "A: 42 K", "\\text{B. 42 K}", "", "E"]


@pytest.mark.parametrize("source", SOURCES)
def test_the_label_is_read_in_every_form(source):
    for form in FORMS:
        for prompt in (QUESTION, None):
            assert grade(f"\\boxed{{{form}}}", "C", data_source=source, prompt=prompt) == 1.0, (form, prompt)
    for form in OTHERS:
        for prompt in (QUESTION, None):
            assert grade(f"\\boxed{{{form}}}", "C", data_source=source, prompt=prompt) == 0.0, (form, prompt)


def test_the_text_of_an_option_chooses_it_where_it_is_unique():
    def verdict(answer: str, gold: str, question: str = QUESTION) -> float | None:
        return grade(f"\\boxed{{{answer}}}", gold, data_source="my/set", prompt=question)

    assert verdict("42 K", "C") == verdict("42\\text{ K}", "C") == 1.0
    assert verdict("2 K", "C") == 0.0
    assert verdict("C", "42 K") == verdict("42 K", "42 K") == verdict("(C) 42 K", "(C) 42 K") == 1.0
    assert verdict("B", "42 K") == 0.0
    twice = QUESTION.replace("3 K", "42 K")
    assert verdict("42 K", "C", twice) == 0.0


def test_letters_beyond_d_and_several_letters():
    ten = "\n".join(f"{letter}. thing {letter}" for letter in "ABCDEFGHIJ") + "\nAnswer in \\boxed{}."
    assert grade("\\boxed{J: thing J}", "J", data_source="supergpqa", prompt=ten) == 1.0
    assert grade("\\boxed{I}", "J", data_source="supergpqa", prompt=ten) == 0.0
    assert grade("\\boxed{A, C}", "AC", data_source="agieval", prompt=ten) == 1.0
    assert grade("\\boxed{A}", "AC", data_source="agieval", prompt=ten) == 0.0


def test_other_forms_than_the_box():
    prompt = QUESTION.replace("Put the letter in \\boxed{}.", "The last line should be: 'Answer: $LETTER'.")
    assert grade("So it is hot.\nAnswer: C", "C", data_source="gpqa", prompt=prompt) == 1.0
    assert grade("So it is hot.\nAnswer: (C) 42 K", "C", data_source="gpqa", prompt=prompt) == 1.0
    assert grade("So it is hot.\nAnswer: D", "C", data_source="gpqa", prompt=prompt) == 0.0


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (QUESTION, {"A": "1 K", "B": "2 K", "C": "42 K", "D": "3 K"}),
        ("Q? (A) 12 (B) 14 (C) 16", {"A": "12", "B": "14", "C": "16"}),
        ("$\\textbf{(A)}\\ 12 \\qquad\\textbf{(B)}\\ 15\\qquad\\textbf{(C)}\\ 18$", {"A": "12", "B": "15", "C": "18"}),
        ("下列?\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n请选择。", {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}),
        ("Q?\n(1) foo\n(2) bar\n(3) baz\n(4) qux", {"1": "foo", "2": "bar", "3": "baz", "4": "qux"}),
        ("Let A be a set. Then B. Find C.", {}),
        ("What is 3.5 + 2.1?", {}),
    ],
)
def test_options_are_found_in_a_question(question, options):
    assert options_of(question) == options


def test_a_formula_with_a_letter_is_not_a_choice():
    assert grade("\\boxed{A=5}", "5", data_source="math") == 1.0
    assert grade("\\boxed{k}", "2k", data_source="math") == 0.0
