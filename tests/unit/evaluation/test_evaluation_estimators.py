"""Estimators against an enumeration of all possibilities."""

import itertools
import math
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from clipo_megatron.evaluation.estimators import (
    bootstrap_means,
    interval,
    interval_of,
    majority_at,
    mcnemar_p_value,
    mean_and_error,
    pass_at_k,
    unpaired_interval,
    usual_ks,
)

RIGHT, SILENT = 0, None


def answers_of(samples, correct, others):
    """A list of answers with these counts: 0 is right, 1, 2 .. are wrong ones, None is no answer."""
    wrong = [index + 1 for index, count in enumerate(others) for _ in range(count)]
    return [RIGHT] * correct + wrong + [SILENT] * (samples - correct - len(wrong))


def elected(voters):
    """Chance that these voters elect the right answer, ties being drawn."""
    counts = {answer: voters.count(answer) for answer in set(voters) - {SILENT}}
    if not counts:
        return Fraction(0)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return Fraction(int(RIGHT in winners), len(winners))


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_against_every_subset(samples):
    for correct in range(samples + 1):
        solved = [sample < correct for sample in range(samples)]
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(solved, k))
            expected = Fraction(sum(map(any, draws)), len(draws))
            assert pass_at_k(samples, correct, k) == pytest.approx(float(expected), abs=1e-15)


def test_pass_at_k_of_very_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-12)
    assert pass_at_k(10_000, 9_999, 2) == 1.0
    # the product form of the paper's own code
    assert pass_at_k(64, 3, 5) == pytest.approx(1 - math.prod(1 - 5 / i for i in range(62, 65)), rel=1e-12)


def partitions(total, most):
    yield ()
    for first in range(min(total, most), 0, -1):
        for rest in partitions(total - first, first):
            yield (first, *rest)


@pytest.mark.parametrize("samples", range(1, 8))
def test_majority_against_every_subset(samples):
    """Every way that so many samples can agree, and every subset of them as voters."""
    cases = 0
    for correct in range(samples + 1):
        for others in partitions(samples - correct, samples):
            answers = answers_of(samples, correct, others)
            for k in range(1, samples + 1):
                draws = list(itertools.combinations(answers, k))
                expected = sum(map(elected, draws), Fraction(0)) / len(draws)
                assert majority_at(samples, correct, others, (k,))[k] == pytest.approx(float(expected), abs=1e-13)
                cases += 1
    assert cases >= samples


def test_majority_of_all_is_the_vote_itself():
    assert majority_at(16, 6, (5, 5), (16,))[16] == 1.0
    assert majority_at(16, 5, (6, 5), (16,))[16] == 0.0
    assert majority_at(15, 5, (5, 5), (15,))[15] == pytest.approx(1 / 3)
    assert majority_at(16, 1, (), (16,))[16] == 1.0  # the others gave no answer
    assert majority_at(16, 0, (), (16,))[16] == 0.0


def test_all_ks_at_once_are_each_of_them():
    case = (40, 12, (9, 9, 4, 2, 1))
    found = majority_at(*case, usual_ks(40))
    assert found == {k: pytest.approx(majority_at(*case, (k,))[k], rel=1e-12) for k in usual_ks(40)}


def test_majority_of_very_many_samples():
    assert majority_at(200, 80, (120,), (200,))[200] == 0.0
    assert majority_at(1000, 500, (500,), (1000,))[1000] == pytest.approx(0.5, rel=1e-9)
    assert majority_at(1000, 500, (500,), (501,))[501] == pytest.approx(
        0.5, rel=1e-9
    )  # by symmetry, and no tie is possible
    with pytest.raises(ValueError, match="not counts of 1001"):
        majority_at(1001, 1, (), (1,))[1]


def test_majority_of_one_is_pass_at_one():
    for correct, others in ((3, (2, 1)), (0, (6,)), (6, ()), (2, ())):
        assert majority_at(6, correct, others, (1,))[1] == pytest.approx(correct / 6)


def test_majority_by_drawing_where_counting_is_too_long():
    samples, correct, others, k = 64, 20, (18, 9, 5, 2, 1, 1, 1), 16
    answers, generator = answers_of(samples, correct, others), random.Random(1)
    found = [float(elected(generator.sample(answers, k))) for _ in range(20_000)]
    expected = majority_at(samples, correct, others, (k,))[k]
    assert abs(sum(found) / len(found) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(found))


def test_impossible_counts_are_refused():
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k} of 4"):
            pass_at_k(4, 1, k)
        with pytest.raises(ValueError, match=f"k = {k} of 4"):
            majority_at(4, 1, (), (k,))[k]
    with pytest.raises(ValueError, match="not counts of 4"):
        majority_at(4, 3, (2,), (1,))[1]


def test_the_error_is_that_of_a_mean_of_problems():
    shares = [0.0, 0.25, 0.5, 1.0]
    mean, error = mean_and_error(shares)
    assert mean == 0.4375
    variance = sum((Fraction(share) - Fraction(7, 16)) ** 2 for share in shares) / 3
    assert error == pytest.approx(math.sqrt(variance / 4), rel=1e-12)
    assert mean_and_error([0.5]) == (0.5, None)
    assert mean_and_error([]) == (0.0, None)
    # 0/1 outcomes of 1,319 problems: the 1.3 points that the paper's single greedy runs have
    assert mean_and_error([1.0] * 800 + [0.0] * 519)[1] == pytest.approx(0.01346, abs=1e-5)


def test_usual_ks():
    assert [usual_ks(n) for n in (1, 2, 3, 16, 20)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 20)]


def test_bootstrap_against_every_resample():
    """The distribution of the mean of four problems drawn with replacement, all 256 ways."""
    differences = [-1.0, 0.0, 0.5, 0.5]
    ways = [sum(draw) / 4 for draw in itertools.product(differences, repeat=4)]
    means = bootstrap_means(differences, resamples=200_000, seed=3)
    for value in sorted(set(ways)):
        share = ways.count(value) / len(ways)
        assert abs(np.isclose(means, value).mean() - share) < 5 * math.sqrt(share / 200_000) + 1e-9, value
    assert np.array_equal(means, bootstrap_means(differences, resamples=200_000, seed=3))
    assert not np.array_equal(means, bootstrap_means(differences, resamples=200_000, seed=4))


def test_bootstrap_interval_of_many_problems_is_the_normal_one():
    generator = random.Random(0)
    differences = [generator.choice((-1, 0, 0, 0, 1, 1)) for _ in range(2000)]
    mean, error = mean_and_error(differences)
    low, high = interval_of(bootstrap_means(differences))
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert interval_of(bootstrap_means([0.0] * 10)) == (0.0, 0.0)
    assert interval_of(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert interval_of(np.arange(1001.0), confidence=0.8) == pytest.approx((100.0, 900.0))


def p_by_enumeration(gained, lost):
    """Share of all ways to toss a coin for each changed problem that are at least as lopsided as what was seen."""
    seen = abs(gained - lost)
    tosses = list(itertools.product((1, -1), repeat=gained + lost))
    return sum(abs(sum(toss)) >= seen for toss in tosses) / len(tosses)


@pytest.mark.parametrize("changed", range(13))
def test_mcnemar_against_all_coin_tosses(changed):
    for gained in range(changed + 1):
        p = mcnemar_p_value(gained, changed - gained)
        assert p == pytest.approx(p_by_enumeration(gained, changed - gained), rel=1e-12)
        assert p == mcnemar_p_value(changed - gained, gained)


def test_mcnemar_of_very_many_problems():
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(40, 0) == pytest.approx(2.0**-39)
    assert 0.0 <= mcnemar_p_value(5000, 100) < 1e-300
    assert mcnemar_p_value(20_000, 20_000) == 1.0


def test_the_figures_need_no_torch():
    script = (
        "import sys\n"
        "import clipo_megatron.cli.evaluate, clipo_megatron.evaluation.tables\n"
        "from clipo_megatron.evaluation.estimators import bootstrap_means\n"
        "bootstrap_means([0.0, 1.0])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- seeds


def test_intervals_over_seeds_are_those_of_student():
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-3))
    assert interval([2.0]) == (2.0, math.inf) and interval([2.0] * 9) == (2.0, 0.0)
    with pytest.raises(ValueError, match="no differences"):
        interval([])


def test_intervals_between_unpaired_seeds_are_those_of_welch():
    """By hand: variances 1 of 3 values and 4 of 4 make (1/3 + 1)^2 / ((1/3)^2 / 2 + 1 / 3) = 4.57 degrees, so 4."""
    before, after = [1.0, 2.0, 3.0], [7.0, 7.0, 7.0 + 4.0, 7.0]
    assert unpaired_interval(before, after) == (6.0, pytest.approx(2.7764 * math.sqrt(1 / 3 + 1), rel=1e-3))
    assert unpaired_interval([1.0], after)[1] == math.inf and unpaired_interval([1.0] * 2, [3.0] * 2) == (2.0, 0.0)
    with pytest.raises(ValueError, match="one is empty"):
        unpaired_interval([], [1.0])


@pytest.mark.parametrize("count", [2, 5, 12])
def test_intervals_cover_the_true_value_as_often_as_they_should(count):
    """Of 2000 draws of so many seeds, 95% of the intervals hold the difference: 93.5% to 96.5%, three errors."""
    random_numbers = np.random.default_rng(count)
    paired = between = 0
    for _ in range(2000):
        before, after = random_numbers.normal(0, 1, count), random_numbers.normal(0.5, 1, count)
        mean, half = interval((after - before).tolist())
        paired += abs(mean - 0.5) <= half
        mean, half = unpaired_interval(before.tolist(), after.tolist())
        between += abs(mean - 0.5) <= half
    assert 0.935 <= paired / 2000 <= 0.965 and between / 2000 >= 0.935
