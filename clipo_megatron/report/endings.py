"""The step after which runs of a group, or of two groups, are compared while some of them still run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from clipo_megatron.evaluation.results import Evaluation
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.reading import Accuracy, RunRecord


@dataclass(frozen=True)
class Ending:
    """The runs of a group that were evaluated after `step` steps; runs that were not are left out."""

    group: RunGroup
    step: int  # steps done
    runs: tuple[RunRecord, ...]  # not empty

    @property
    def is_last(self) -> bool:
        """Whether the runs have done all steps that their settings ask for."""
        wanted = [run.wanted_steps for run in self.runs]
        return all(not isinstance(each, int) or self.step >= each for each in wanted)


def ending(group: RunGroup) -> Ending | None:
    """The last step that all runs of a group have evaluated; None where nothing was evaluated.

    An evaluation before training says nothing about a method, so a run that has no other is left out if others have.
    Where no step was evaluated by all, the step that most runs have evaluated is taken, and the last of several.
    """
    evaluated = [run for run in group.runs if run.evaluations]
    trained = [run for run in evaluated if run.evaluations[-1].step > 0]
    counts = Counter(step for run in trained or evaluated for step in _steps(run) if step > 0 or not trained)
    if not counts:
        return None
    step = max(counts, key=lambda step: (counts[step], step))
    return Ending(group, step, tuple(run for run in evaluated if step in _steps(run)))


def endings_of(first: RunGroup, second: RunGroup) -> tuple[Ending, Ending] | None:
    """The evaluations by which two groups are compared; None where one of them was not evaluated.

    Each group is taken at its end, but while one still runs, both after the last step that all their runs have
    evaluated.
    """
    found = ending(first), ending(second)
    if None in found:
        return None
    one, other = found
    if one.step == other.step or (one.is_last and other.is_last):
        return one, other
    shared = set.intersection(*(_steps(run) for run in (*one.runs, *other.runs))) - {0}
    if not shared:
        return one, other
    return replace(one, step=max(shared)), replace(other, step=max(shared))


def evaluation_at(run: RunRecord, step: int) -> Evaluation:
    """The run's evaluation after `step` steps; KeyError if there is none."""
    return {each.step: each for each in run.evaluations}[step]


def accuracies_at(run: RunRecord, step: int) -> list[Accuracy]:
    """The accuracy on each source after `step` steps."""
    return [each for each in run.accuracies if each.step == step]


def sentences(group: RunGroup) -> list[str]:
    """Notes on runs and steps that the final accuracy of a group leaves out."""
    end = ending(group)
    if end is None or len(group.runs) < 2:
        return []
    found = [
        f"{run.label}: it is left out of its group's accuracy, which is that after {end.step} steps: its last "
        f"evaluation is that {f'after {last}' if (last := run.evaluations[-1].step) else 'before training'}."
        for run in group.runs
        if run.evaluations and run not in end.runs
    ]
    if any(run.evaluations[-1].step > end.step for run in end.runs):
        found.append(
            f"{group.label}: its accuracy is that after {end.step} steps, the last that all its runs have evaluated; "
            "some runs are further."
        )
    return found


def _steps(run: RunRecord) -> set[int]:
    return {each.step for each in run.evaluations}
