"""Paired differences: what every group gained over the first one, on the same seeds and problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clipo_megatron.evaluation.comparing import Comparison, comparisons, refuse_other_problems
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.estimators import interval, unpaired_interval
from clipo_megatron.evaluation.results import Evaluation, ProblemResult
from clipo_megatron.report.endings import Ending, ending, endings_of, evaluation_at
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.parts import swatch, table
from clipo_megatron.report.reading import RunRecord
from clipo_megatron.report.scales import number, percent, safe

_TINY = 1e-9
_SEVERAL = 2  # least number of runs of each group for an interval over seeds


@dataclass(frozen=True)
class Paired:
    """The difference of two groups on one set of problems."""

    problems: Comparison  # all seeds' answers taken together; its interval is over problems
    difference: float  # difference of the mean accuracies, after - before
    half: float | None  # half the width of the 95% interval over seeds; None where a group has one run


def paired(groups: Sequence[RunGroup]) -> str:
    """The card of paired differences; of one group, before and after training. Empty where nothing can be paired."""
    with_results = [group for group in groups if any(run.evaluations for run in group.runs)]
    if len(with_results) < 2:
        return "".join(_before_and_after(group) for group in with_results)
    first, *others = with_results
    pairs, notes = [], []
    for group in others:
        try:
            found, remarks = pair(first, group)
        except EvaluationError as error:
            notes.append(str(error))
            continue
        pairs += [(group, each) for each in found]
        notes += [f"{group.label} over {first.label}: {sentence}" for sentence in remarks]
    # Sorted by set, so that groups stand side by side; the rows over all sets stay last.
    order = list(dict.fromkeys(each.problems.source for _, each in pairs))
    pairs.sort(key=lambda pair: order.index(pair[1].problems.source))
    seeds = any(each.half is not None for _, each in pairs)
    tested = any(each.problems.p_value is not None for _, each in pairs)
    rows = [_row(group, each, seeds=seeds, tested=tested) for group, each in pairs]
    headings = ["group", "set", "solved"]
    headings += ["points, 95% over seeds", "(over problems)"] if seeds else ["points, 95% over problems"]
    headings += ["gained / lost"] + ["p"] * tested
    shown = table(headings, rows, numbers=range(2, len(headings))) if rows else ""
    items = "".join(f"<li>{safe(sentence)}</li>" for sentence in notes)
    below = f'<ul class="notes">{items}</ul>' if items else ""
    below += f'<p class="caption">{_caption(first, seeds=seeds, tested=tested)}</p>'
    return _card(f"Paired differences: against {safe(first.label)}", shown + below)


def _card(title: str, content: str) -> str:
    return f'<div class="card below"><h3>{title}</h3>{content}</div>'


def _before_and_after(group: RunGroup) -> str:
    """The card on what training changed: the first evaluation of each run against that at the end of its group."""
    end = ending(group)
    begun = {run.evaluations[0].step for run in end.runs} if end else set()
    if end is None or len(begun) != 1 or (first := min(begun)) >= end.step:
        return ""
    before, after = replace(end, step=first), end
    try:
        _refuse(before, after)
    except EvaluationError as error:
        return _card("Before and after", f'<ul class="notes"><li>{safe(str(error))}</li></ul>')
    found = _differences(before, after, matched=len(end.runs) >= _SEVERAL, several=len(end.runs) >= _SEVERAL)
    seeds = any(each.half is not None for each in found)
    tested = any(each.problems.p_value is not None for each in found)
    rows = [_row(group, each, seeds=seeds, tested=tested)[1:] for each in found]
    headings = ["set", "solved"]
    headings += ["points, 95% over seeds", "(over problems)"] if seeds else ["points, 95% over problems"]
    headings += ["gained / lost"] + ["p"] * tested
    begin = "before training" if first == 0 else f"after {first} steps"
    caption = f"The policy {begin} against that after {end.step} steps, on the same problems. {_how(seeds, tested)}"
    shown = table(headings, rows, numbers=range(1, len(headings)))
    return _card("Before and after", f'{shown}<p class="caption">{caption}</p>')


def pair(first: RunGroup, second: RunGroup) -> tuple[list[Paired], list[str]]:
    """The differences on each set and on all sets together, and notes on which runs were compared.

    Where both groups have two runs or more, seeds that both have are paired: what a seed draws, such as the order of
    the problems, is then the same on both sides. Where they share fewer than two, the groups are unpaired samples.

    Raises:
        EvaluationError: the groups were evaluated on different problems, or one was not evaluated.
    """
    ends = endings_of(first, second)
    if ends is None:
        raise EvaluationError(f"{first.label} and {second.label} are not compared: one of them was not evaluated")
    (before, after), notes = ends, []
    if before.step != after.step or not (before.is_last and after.is_last):
        notes.append(_steps_note(before, after))
    mine, other = _by_seed(before), _by_seed(after)
    shared = sorted(mine.keys() & other.keys())
    several = min(len(before.runs), len(after.runs)) >= _SEVERAL
    matched = several and len(shared) >= _SEVERAL
    if matched:
        if len(shared) < max(len(before.runs), len(after.runs)):
            notes.append(f"seeds {', '.join(map(str, shared))}, which both have.")
        before = replace(before, runs=tuple(mine[seed] for seed in shared))
        after = replace(after, runs=tuple(other[seed] for seed in shared))
    elif several:
        notes.append("their seeds differ, so the interval over seeds is Welch's for unpaired samples.")
    _refuse(before, after)
    return _differences(before, after, matched=matched, several=several), notes


def _differences(before: Ending, after: Ending, *, matched: bool, several: bool) -> list[Paired]:
    """The differences on each set and on all sets together; `matched`: the runs of both sides belong together."""
    whole = _together(before), _together(after)
    sets = [source for source in whole[0].sources if source in whole[1].sources]
    figures = [[_figures(run, end.step, sets) for run in end.runs] for end in (before, after)]
    found = []
    for each in comparisons(*whole):
        was, became = ([run[each.source] for run in side] for side in figures)
        if not several:
            found.append(Paired(each, each.difference, None))
        elif matched:
            found.append(Paired(each, *interval([b - a for a, b in zip(was, became, strict=True)])))
        else:
            found.append(Paired(each, *unpaired_interval(was, became)))
    return found


def _by_seed(end: Ending) -> dict[int, RunRecord]:
    """Runs by seed; empty where a seed is unknown or two runs have the same."""
    found = {run.seed: run for run in end.runs if run.seed is not None}
    return found if len(found) == len(end.runs) else {}


def _figures(run: RunRecord, step: int, sets: Sequence[str]) -> dict[str, float]:
    """Accuracies by the names that `comparisons` gives its rows."""
    kept = evaluation_at(run, step).of(sets)
    return {**kept.by_source(), "all problems": kept.accuracy, "mean of sets": kept.mean_of_sets[0]}


def _together(end: Ending) -> Evaluation:
    """The evaluations of a group's runs as one, in which each problem has the answers of all seeds."""
    problems: dict[str, ProblemResult] = {}
    for each in (evaluation_at(run, end.step) for run in end.runs):
        for name, result in each.problems.items():
            held = problems.get(name)
            samples, correct = (held.samples, held.correct) if held else (0, 0)
            problems[name] = ProblemResult(samples + result.samples, correct + result.correct, digest=result.digest)
    return Evaluation(end.step, problems)


def _refuse(before: Ending, after: Ending) -> None:
    """Raise an EvaluationError unless all runs were evaluated on the first run's problems."""
    first = before.runs[0]
    for end in (before, after):
        for run in end.runs:
            results = evaluation_at(first, before.step), evaluation_at(run, end.step)
            refuse_other_problems(*results, (first.label, run.label))


def _steps_note(before: Ending, after: Ending) -> str:
    if before.step == after.step:
        return f"both after {before.step} steps, the last that all their runs have evaluated."
    return f"after {after.step} steps over {before.step}."


def _row(group: RunGroup, found: Paired, *, seeds: bool, tested: bool) -> list[str]:
    each = found.problems
    points = f"<b>{_signed(found.difference)}</b>"
    over_problems = "–"  # a single figure, or figures that are all equal, have no interval
    if each.has_interval:
        over_problems = f"({_points(each.low, each.high)})" if seeds else _points(each.low, each.high)
    if not seeds:
        cells = [f"{points} <span class='aside'>{over_problems}</span>"]
    else:
        over_seeds = ""
        if found.half is not None and found.half > _TINY:
            low, high = found.difference - found.half, found.difference + found.half
            over_seeds = f" <span class='main'>{_points(low, high)}</span>"
        cells = [f"{points}{over_seeds}", f"<span class='aside'>{over_problems}</span>"]
    cells.append(f"{each.gained} / {each.lost}")
    if tested:
        cells.append("–" if each.p_value is None else number(each.p_value, 2))
    return [swatch(group), safe(each.source), f"{percent(each.before)} → {percent(each.after)}", *cells]


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _points(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _caption(first: RunGroup, *, seeds: bool, tested: bool) -> str:
    text = f"Each group against {safe(first.label)}, which is the first group or the one of <code>--against</code>. "
    return text + _how(seeds, tested)


def _how(seeds: bool, tested: bool) -> str:
    """How the figures of a row came about."""
    if seeds:
        text = (
            "The interval over seeds (Student's t of the differences seed by seed) covers training with other seeds: "
            "it tells whether a method is better. The one in brackets (bootstrap over problems) covers these trained "
            "policies on other problems, not other seeds. A group of one run has no interval over seeds. Gained and "
            "lost: problems that more than half of the answers of all seeds solve on one side only."
        )
    else:
        text = (
            "The interval (bootstrap over problems) covers other problems, not other seeds. "
            "Gained and lost: problems that only one side solves."
        )
    return text + (" p: exact McNemar test, where each problem has one answer a side." if tested else "")
