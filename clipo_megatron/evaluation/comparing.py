"""Compares two evaluations problem by problem: how much better is one, and could that be chance? Imports no torch.

Both evaluations have the same problems, so what is hard for both cancels. The difference on each problem is the unit,
and the interval of its mean is far narrower than the intervals of the two accuracies suggest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

from clipo_megatron.data.sources import source_of
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.estimators import RESAMPLES, bootstrap_means, interval_of, mcnemar_p_value
from clipo_megatron.evaluation.results import Evaluation

_NAMED = 3  # how many problems an error message names


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, paired over the problems that both have."""

    source: str  # name of a set, "all problems" or "mean of sets"
    problems: int
    before: float  # pass@1 on these problems
    after: float
    low: float  # 95% interval of after - before, from the bootstrap over problems
    high: float
    gained: int  # problems solved only after; solved means that more than half of the samples are correct
    lost: int  # problems solved only before
    p_value: float | None  # exact two-sided McNemar test; None unless both have one sample of each problem

    @property
    def difference(self) -> float:
        """Difference of pass@1, after - before."""
        return self.after - self.before

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval: one problem, or differences that are all equal, have no spread."""
        return self.low < self.high


def compare(
    before: Evaluation, after: Evaluation, *, source: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare two evaluations over the problems that both have, or over those of one set."""
    names = _shared(before, after, source)
    solved = [(before.correct[name] > 0.5, after.correct[name] > 0.5) for name in names]
    gained = sum(b and not a for a, b in solved)
    lost = sum(a and not b for a, b in solved)
    first, second = (sum(each.correct[name] for name in names) / max(len(names), 1) for each in (before, after))
    low, high = interval_of(_means(before, after, names, resamples, seed)) if names else (0.0, 0.0)
    single = all(each.problems[name].samples == 1 for each in (before, after) for name in names)
    p_value = mcnemar_p_value(gained, lost) if single else None
    return Comparison(source or "all problems", len(names), first, second, low, high, gained, lost, p_value)


def comparisons(
    before: Evaluation, after: Evaluation, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Comparison]:
    """A comparison for each set; with several sets also for all problems, and for the mean of sets."""
    sources = sorted({source_of(name) for name in _shared(before, after, None)})
    options = {"resamples": resamples, "seed": seed}
    found = [compare(before, after, source=source, **options) for source in sources]
    if len(found) < 2:
        return found
    everything = compare(before, after, **options)
    # The sets are independent, so each has its own random numbers.
    drawn = [
        _means(before, after, _shared(before, after, source), resamples, seed + 1 + index)
        for index, source in enumerate(sources)
    ]
    low, high = interval_of(sum(drawn) / len(drawn))
    first, second = (sum(getattr(each, side) for each in found) / len(found) for side in ("before", "after"))
    gained, lost = everything.gained, everything.lost
    mean = Comparison("mean of sets", everything.problems, first, second, low, high, gained, lost, None)
    return [*found, everything, mean]


def refuse_other_problems(before: Evaluation, after: Evaluation, names: tuple[str, str]) -> None:
    """Check that the sets that two evaluations share have the same problems in both.

    Args:
        before: one evaluation.
        after: the other one.
        names: what the message calls them.

    Raises:
        EvaluationError: they share no set, or the problems of one differ.
    """
    shared = [source for source in before.sources if source in after.sources]
    if not shared:
        raise EvaluationError(
            f"{names[0]} has the sets {_listed(before.sources)} and {names[1]} has {_listed(after.sources)}: there is "
            "nothing to pair. Evaluate both on the same sets (`clipo eval --set`)."
        )
    for source in shared:
        mine, other = before.of([source]).problems, after.of([source]).problems
        if alone := sorted(mine.keys() ^ other.keys()):
            raise EvaluationError(
                f"the set {source} has {len(mine)} problems in {names[0]} and {len(other)} in {names[1]}; "
                f"{len(alone)} of them are in one alone, such as {alone[0]}. Evaluate both on the same problems, or "
                "leave the set out with --set."
            )
        if changed := sorted(name for name, each in mine.items() if each.digest != other[name].digest):
            raise EvaluationError(
                f"{len(changed)} of {len(mine)} problems of the set {source} have another question or ground truth in "
                f"{names[1]} than in {names[0]}, such as {_listed(changed)}: their answers are no pairs. Evaluate both "
                "on the same file, or leave the set out with --set."
            )


def _shared(before: Evaluation, after: Evaluation, source: str | None) -> list[str]:
    names = sorted(before.problems.keys() & after.problems.keys())
    return names if source is None else [name for name in names if source_of(name) == source]


def _means(before: Evaluation, after: Evaluation, names: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    differences = [after.correct[name] - before.correct[name] for name in names]
    return bootstrap_means(differences, resamples=resamples, seed=seed)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "none") + more
