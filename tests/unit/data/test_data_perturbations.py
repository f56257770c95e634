"""Perturbed problems: their answers, computed again from their text, and what a perturbation keeps."""

import re
from fractions import Fraction

import pytest
import reasoning_gym

from clipo_megatron.config.schema import Perturbation, SourceConfig
from clipo_megatron.data.perturbations import PerturbationError, perturb, with_clause
from clipo_megatron.data.sources import read
from clipo_megatron.rewards import grade

SIZE = 300
KINDS = list(Perturbation)
NUMBER = r"(\d+(?:,\d{3})*(?:\.\d+)?)"


@pytest.fixture(scope="module")
def word_problems():
    return reasoning_gym.create_dataset("gsm_symbolic", seed=11, size=SIZE)


@pytest.fixture(scope="module")
def equations():
    return reasoning_gym.create_dataset("simple_equations", seed=11, size=SIZE)


def numbers_in(text):
    return [Fraction(found.replace(",", "")) for found in re.findall(NUMBER, text)]


def changed(dataset, kind, seed=1):
    """Pairs of a problem and its perturbed form; problems without one are left out."""
    pairs = []
    for index in range(SIZE):
        try:
            pairs.append((dataset[index], perturb(dataset, index, kind, seed)))
        except PerturbationError:
            continue
    assert len(pairs) >= 0.95 * SIZE
    return pairs


# ---------------------------------------------------------------- answers, from the text alone

SOLVERS = [
    (
        rf"can peel {NUMBER} \S+ a minute and saute {NUMBER} \S+ in {NUMBER} minutes\..*peel and saute {NUMBER} ",
        lambda peel, batch, minutes, total: total / peel + total / batch * minutes,
    ),
    (
        rf"building blocks has {NUMBER} .*stuffed animals has {NUMBER} .*rings has {NUMBER} .*up to {NUMBER}\.",
        lambda blocks, animals, rings, total: total - blocks - animals - rings,
    ),
    (
        rf"takes \S+ {NUMBER} minutes to finish .*? and {NUMBER} minutes to finish .*solved {NUMBER} .* and {NUMBER} ",
        lambda first, second, firsts, seconds: first * firsts + second * seconds,
    ),
    (
        rf"from {NUMBER} different apartment complexes\. The first \d+ have {NUMBER} apartments each and the last one "
        rf"is {NUMBER}% bigger.*garbage {NUMBER} times.*paid \D{NUMBER} per",
        lambda n, each, percent, times, pay: (n - 1) * each * (2 + percent / 100) * times * pay,
    ),
]


def worked_out(question):
    for pattern, solve in SOLVERS:
        if found := re.search(pattern, question):
            return solve(*(Fraction(number.replace(",", "")) for number in found.groups()))
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_perturbed_word_problems_are_correct(word_problems, kind):
    checked = 0
    for _, entry in changed(word_problems, kind):
        answer = worked_out(entry["question"])
        if answer is not None:
            assert Fraction(entry["answer"].replace(",", "")) == answer, entry["question"]
            checked += 1
    assert checked >= 8


def solution_of(question):
    """The solution of the linear equation in the text: (right - left(0)) / (left(1) - left(0))."""
    left, right = re.search(r"([\w*+\- ()]+) = (-?\d+)$", question.rpartition(": ")[2]).groups()
    (variable,) = set(re.findall(r"[a-z]", left))
    at = [eval(left, {"__builtins__": {}}, {variable: Fraction(value)}) for value in (0, 1)]
    return (Fraction(int(right)) - at[0]) / (at[1] - at[0])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_perturbed_equations_are_correct(equations, kind):
    for before, entry in changed(equations, kind):
        assert solution_of(entry["question"]) == Fraction(entry["answer"]), entry["question"]
        assert (entry["answer"] != before["answer"]) is (kind is Perturbation.numbers)


# ---------------------------------------------------------------- what stays


def test_numbers_change_and_words_stay(word_problems):
    same_words = 0
    for before, after in changed(word_problems, Perturbation.numbers):
        assert after["answer"] != before["answer"], "who remembers the answer does not solve it"
        assert after["question"] != before["question"]
        names = [{value for key, value in each["metadata"]["variables"].items() if key.startswith("name")}
                 for each in (before, after)]  # fmt: skip
        assert names[0] == names[1]
        same_words += re.sub(NUMBER, "#", before["question"]) == re.sub(NUMBER, "#", after["question"])
    assert same_words > 0.8 * SIZE  # in the others numbers are written as words, or decide a plural


def test_names_change_and_numbers_stay(word_problems):
    for before, after in changed(word_problems, Perturbation.names):
        assert after["answer"] == before["answer"]
        assert after["question"] != before["question"]
        assert numbers_in(after["question"]) == numbers_in(before["question"])


@pytest.mark.parametrize("problems", ["word_problems", "equations"])
def test_a_clause_is_one_more_sentence_about_something_else(problems, request):
    for before, after in changed(request.getfixturevalue(problems), Perturbation.clause):
        assert after["answer"] == before["answer"]
        question, longer = before["question"].split(), after["question"].split()
        start = next((place for place, word in enumerate(question) if longer[place] != word), len(question))
        end = start + len(longer) - len(question)
        assert longer[:start] + longer[end:] == question, "nothing else changes"
        clause = longer[start:end]
        (number,) = [word for word in clause if word.isdigit()]
        assert 11 <= int(number) <= 97
        things = {"lighthouse", "comet", "thunderstorm", "bridge", "giraffe", "submarine", "blackboard", "student"}
        (thing,) = things & set(" ".join(clause).lower().split())
        assert thing not in before["question"].lower()


def test_a_clause_stands_before_the_question_sentence():
    from random import Random

    clauses = (("comet", "A comet came {n} times."),)
    asked = with_clause("Bo has 3 pens. He buys 4. How many has he? Answer in digits.", clauses, Random(0))
    assert re.fullmatch(r"Bo has 3 pens. He buys 4. A comet came \d+ times. How many has he\? Answer in digits.", asked)
    assert re.fullmatch(
        r"A comet came \d+ times. Solve for a: a = 1", with_clause("Solve for a: a = 1", clauses, Random(0))
    )


def test_perturbations_depend_on_the_seed(word_problems):
    first, again, other = (changed(word_problems, Perturbation.numbers, seed) for seed in (1, 1, 2))
    assert first == again
    assert sum(a != b for a, b in zip(first, other, strict=False)) > 0.9 * SIZE


# ---------------------------------------------------------------- as a source


@pytest.mark.parametrize("generator", ["gsm_symbolic", "simple_equations"])
def test_sources_of_perturbed_problems(generator):
    plain = read(SourceConfig(generator=generator, size=40, seed=3))
    for kind in KINDS:
        source = SourceConfig(generator=generator, size=40, seed=3, perturb=kind, suffix=" Box it.")
        rows = read(source)
        assert source.label == f"{generator}_{kind.value}"
        assert 36 <= len(rows) <= 40
        by_number = {row.id.rpartition("/")[2]: row for row in plain}
        for row in rows:
            before = by_number[row.id.rpartition("/")[2]]
            assert row.messages[0]["content"].endswith(" Box it.") and row.messages != before.messages
            assert row.data_source == f"reasoning_gym/{generator}"
            options = {"data_source": row.data_source, "mode": "auto", "extra": row.extra}
            assert grade(f"\\boxed{{{row.ground_truth}}}", row.ground_truth, **options) == 1.0
            if kind is Perturbation.numbers:
                assert grade(f"\\boxed{{{before.ground_truth}}}", row.ground_truth, **options) == 0.0
