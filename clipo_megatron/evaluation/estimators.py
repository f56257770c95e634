"""Estimators from counts: pass@k, maj@k, standard errors, intervals, paired tests. Pure functions; imports no torch.

The unit is the problem. Samples of one problem are not independent evidence, so every error and interval is computed
from one figure for each problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb, inf, sqrt
from typing import TYPE_CHECKING

from clipo_megatron.config.schema.training import MOST_SAMPLES

if TYPE_CHECKING:  # importing numpy takes a tenth of a second, and every `clipo` command imports this module
    import numpy as np

RESAMPLES = 10_000
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; more use the last one, which is slightly too wide.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples, drawn without replacement, is correct.

    The unbiased estimator of Chen et al., arXiv 2107.03374: 1 - C(n - c, k) / C(n, k), for k <= n.

    Raises:
        ValueError: k is not between 1 and the number of samples.
    """
    _check(samples, k)
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


@lru_cache(maxsize=4096)  # many problems have the same counts
def majority_at(samples: int, correct: int, others: tuple[int, ...], ks: tuple[int, ...]) -> dict[int, float]:
    """For each k, the chance that a vote among k samples, drawn without replacement, elects the correct answer.

    It is exact: all C(n, k) draws are counted. Ties are broken at random; samples without an answer do not vote, and a
    vote without voters elects nothing. All terms are positive, so float64 keeps thirteen digits.

    Args:
        samples: n, the samples of one problem, at most `MOST_SAMPLES`.
        correct: number of correct samples, which agree on the correct answer.
        others: number of samples that agree on each wrong answer. The remaining ones gave no answer.
        ks: numbers of voters, each 1 to n.

    Raises:
        ValueError: a k is out of range, or the counts add up to more than n.
    """
    import numpy as np

    for k in ks:
        _check(samples, k)
    silent = samples - correct - sum(others)
    if silent < 0 or correct < 0 or any(each < 1 for each in others) or samples > MOST_SAMPLES:
        raise ValueError(f"{correct} correct and {others} other answers are not counts of {samples} samples")
    won = dict.fromkeys(ks, 0.0)
    for votes in range(1, min(correct, max(ks, default=0)) + 1):
        # Smaller groups can neither win nor tie, so their members count as silent.
        free = silent + sum(each for each in others if each < votes)
        room = max(ks) - votes
        ways = _ways([each for each in others if each >= votes], votes, room)
        shared = (ways / np.arange(1, len(ways) + 1)[:, None]).sum(0)  # [voters], ties split evenly
        rest = np.array([float(comb(free, left)) for left in range(room + 1)])
        for k in ks:
            if k >= votes:
                draws = shared[: k - votes + 1] @ rest[: k - votes + 1][::-1]
                won[k] += float(comb(correct, votes)) * float(draws) / comb(samples, k)
    return won


def _ways(groups: Sequence[int], votes: int, room: int) -> np.ndarray:
    """Ways to draw so many voters, at most `votes` of each group, exactly `ties` groups at `votes`: [ties, voters]."""
    import numpy as np

    table = np.zeros((room // votes + 1, room + 1))
    table[0, 0] = 1.0
    for size in groups:
        grown = table.copy()
        for more in range(1, min(votes - 1, room) + 1):
            grown[:, more:] += table[:, :-more] * float(comb(size, more))
        if votes <= room:
            grown[1:, votes:] += table[:-1, : room + 1 - votes] * float(comb(size, votes))
        table = grown
    return table


def _check(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} of {samples} samples: k must be between 1 and the number of samples")


def usual_ks(samples: int) -> tuple[int, ...]:
    """The default values of k: 1, 2, 4 and so on, and the number of samples."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return (*powers, samples)


def mean_and_error(figures: Sequence[float]) -> tuple[float, float | None]:
    """The mean over problems and its standard error, s / sqrt(N) with s^2 = sum (x - mean)^2 / (N - 1).

    The error is None for fewer than two problems; the mean of none is 0.
    """
    count = len(figures)
    mean = sum(figures) / max(count, 1)
    if count < 2:
        return mean, None
    return mean, sqrt(sum((each - mean) ** 2 for each in figures) / (count - 1) / count)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences, one per seed, and half the width of its 95% interval, t * s / sqrt(N) (Student).

    The width of a single difference is infinite.

    Raises:
        ValueError: there are no differences.
    """
    if not differences:
        raise ValueError("an interval of no differences: give at least one")
    mean, error = mean_and_error(differences)
    return mean, inf if error is None else _t_975(len(differences) - 1) * error


def unpaired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The difference of two unpaired means, after - before, and half the width of its 95% interval (Welch).

    The degrees of freedom are Welch's and Satterthwaite's, rounded down. The width is infinite if a sample has fewer
    than two values.

    Raises:
        ValueError: a sample is empty.
    """
    if not before or not after:
        raise ValueError("an interval between samples of which one is empty: give at least one value of each")
    (first, first_error), (second, second_error) = mean_and_error(before), mean_and_error(after)
    if first_error is None or second_error is None:
        return second - first, inf
    parts = [(first_error**2, len(before) - 1), (second_error**2, len(after) - 1)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return second - first, 0.0
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return second - first, _t_975(int(freedom + 1e-9)) * sqrt(variance)


def _t_975(degrees: int) -> float:
    return _T_975[min(degrees, len(_T_975)) - 1]


def bootstrap_means(differences: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The bootstrap: means of the differences of problems drawn with replacement, [resamples] (Efron).

    Problems with equal differences are interchangeable, so their numbers are drawn from a multinomial distribution.
    That is equivalent to drawing one by one, and much faster.

    Args:
        differences: one per problem, at least one.
        resamples: number of means.
        seed: seed of the draws.
    """
    import numpy as np

    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    draws = np.random.Generator(np.random.Philox(key=seed)).multinomial(total, counts / total, size=resamples)
    return draws @ values / total


def interval_of(means: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval (low, high) of bootstrap means [resamples]."""
    import numpy as np

    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: 2 * P(Binomial(gained + lost, 1/2) <= min), at most 1. McNemar, 1947."""
    trials = gained + lost
    if trials == 0:
        return 1.0
    tail = ways = 1  # of k = 0 heads; integers, which are exact in the far tail too
    for k in range(min(gained, lost)):
        ways = ways * (trials - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**trials)
