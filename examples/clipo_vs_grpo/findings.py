"""What the runs measured, as the tables of README.md: accuracies, what the bonus paid, and what the head sees.

Seeds are the unit: every figure is the mean over the seeds, and every "±" half of its 95% interval over them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from task import is_sound

from clipo_megatron.evaluation.estimators import interval
from clipo_megatron.evaluation.results import read_evaluations
from clipo_megatron.runtime.run_dir import EVALUATIONS, ROLLOUTS, SETTINGS, STATES
from clipo_megatron.telemetry.states import file_of, read_states, steps_with_states

BASELINE = "grpo"
SETS = ("usual", "perturbed")


def tables(home: Path, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """All three, as Markdown; those of the bonus where there was one."""
    folders = {arm: [home / arm / f"seed{seed}" for seed in seeds] for arm in arms}
    about_bonus = [table for table in (bonus_table(folders), cosine_table(folders)) if len(table.splitlines()) > 2]
    return "\n\n".join([accuracy_table(folders), *about_bonus])


# ---------------------------------------------------------------- accuracy


def accuracy_table(folders: dict[str, list[Path]]) -> str:
    """Accuracies before and after training, and how far each arm is from the baseline with the same seed, in points."""
    heads = [f"{name}: accuracy | {name}: against {BASELINE}" for name in SETS]
    lines = [f"| arm | {' | '.join(heads)} | {SETS[-1]}: by seed |", "|---|" + "---:|---:|" * len(SETS) + "---|"]
    found = {arm: [accuracies(each) for each in runs] for arm, runs in folders.items()}
    before = [statistics.fmean(run[name][0] for run in next(iter(found.values()))) for name in SETS]
    lines.append(_row("before training", *(cell for share in before for cell in (f"{share:.1%}", "")), ""))
    for arm, runs in found.items():
        cells, differences = [], []
        for name in SETS:
            cells.append(f"{statistics.fmean(run[name][1] for run in runs):.1%}")
            if arm != BASELINE and BASELINE in found:
                pairs = zip(runs, found[BASELINE], strict=True)
                differences = [100 * (own[name][1] - other[name][1]) for own, other in pairs]
            cells.append(spelled(differences, digits=1))
        by_seed = ", ".join(f"{each:+.1f}" for each in differences)  # of the last set
        lines.append(_row(arm, *cells, by_seed))
    return "\n".join(lines)


def accuracies(output: Path) -> dict[str, tuple[float, float]]:
    """Accuracy of a run on each set, before the first step and after the last."""
    found = read_evaluations(output / EVALUATIONS)
    before, after = found[0].by_source(), found[-1].by_source()
    return {name: (before[name], after[name]) for name in SETS}


def spelled(figures: Sequence[float], *, digits: int) -> str:
    """The mean of figures, one a seed, with its 95% interval; without one for a single seed, empty for none."""
    if not figures:
        return ""
    mean, half = interval(figures)
    signed = f"{mean:+.{digits}f}" if round(mean, digits) else f"{0:.{digits}f}"
    return signed if math.isinf(half) else f"{signed} ± {half:.{digits}f}"


# ---------------------------------------------------------------- what the bonus paid


@dataclass(frozen=True)
class Paid:
    """A group that a run wrote down, in which the bonus paid sound and unfaithful correct responses."""

    sound: list[float]  # their bonuses
    unfaithful: list[float]
    wrong: list[str]  # texts of the wrong ones

    @property
    def gap(self) -> float:
        """How much more it paid the sound ones."""
        return statistics.fmean(self.sound) - statistics.fmean(self.unfaithful)


def paid_groups(output: Path) -> list[Paid]:
    """Those of a run; none where no bonus was paid."""
    found = []
    for rollouts in _groups(output):
        paid = [each for each in rollouts if each["correct"] and each.get("bonus")]
        sound = [each["bonus"] for each in paid if is_sound(each["text"])]
        unfaithful = [each["bonus"] for each in paid if not is_sound(each["text"])]
        if sound and unfaithful:
            found.append(Paid(sound, unfaithful, [each["text"] for each in rollouts if not each["correct"]]))
    return found


def _groups(output: Path) -> Iterator[list[dict[str, Any]]]:
    for line in (output / ROLLOUTS).read_text().splitlines():
        yield json.loads(line)["rollouts"]


def bonus_table(folders: dict[str, list[Path]]) -> str:
    """How much more the bonus paid sound than unfaithful responses of one group, and what these groups look like."""
    lines = [
        "| arm | bonus, sound - unfaithful | seeds that pay sound more | groups | correct rollouts | wrong ones "
        "that are sound | at the floor: sound | at the floor: unfaithful |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, runs in folders.items():
        by_run = [found for each in runs if (found := paid_groups(each))]
        if not by_run:
            continue
        gaps = [statistics.fmean(group.gap for group in found) for found in by_run]
        groups = [group for found in by_run for group in found]
        correct = [len(group.sound) + len(group.unfaithful) for group in groups]
        floor = json.loads((runs[0] / SETTINGS).read_text())["clipo"]["floor"]
        lines.append(
            _row(
                arm,
                spelled(gaps, digits=4),
                f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}",
                str(len(groups)),
                f"{min(correct)} to {max(correct)}, median {statistics.median(correct):g}",
                _share([is_sound(text) for group in groups for text in group.wrong]),
                _share([bonus <= floor + 1e-6 for group in groups for bonus in group.sound]),
                _share([bonus <= floor + 1e-6 for group in groups for bonus in group.unfaithful]),
            )
        )
    return "\n".join(lines)


def _share(found: Sequence[bool]) -> str:
    """Of how many, where there is any."""
    return f"{statistics.fmean(found):.0%} of {len(found)}" if found else ""


# ---------------------------------------------------------------- what the head sees

# Pairs of responses of one group. A slipped one is sound and wrong.
PAIRS = (("sound", "sound"), ("sound", "slipped"), ("unfaithful", "unfaithful"), ("unfaithful", "slipped"))


def cosine_table(folders: dict[str, list[Path]]) -> str:
    """Mean cosines of the head's embeddings in the last step, over the groups that hold all three kinds."""
    heads = " | ".join(f"{first}, {second}" for first, second in PAIRS)
    lines = [f"| arm | groups | {heads} |", "|---|---:|" + "---:|" * len(PAIRS)]
    for arm, runs in folders.items():
        by_run = [found for each in runs if (found := cosines(each))]
        if by_run:
            means = _known_means([_known_means(found) for found in by_run])
            figures = ["" if math.isnan(figure) else f"{figure:.3f}" for figure in means]
            lines.append(_row(arm, str(sum(map(len, by_run))), *figures))
    return "\n".join(lines)


def cosines(output: Path) -> list[NDArray[np.float64]]:
    """Of each group of a run's last step that holds all three kinds: mean cosine of each of `PAIRS`, [4]."""
    if not (steps := steps_with_states(output / STATES)):
        return []
    states = read_states(file_of(output / STATES, steps[-1]))
    if states.embeddings is None:
        return []
    found = []
    for line in (output / ROLLOUTS).read_text().splitlines():
        written = json.loads(line)
        kinds = [_kind(each["text"], each["correct"]) for each in written["rollouts"]]
        if written["step"] == states.step and {"sound", "unfaithful", "slipped"} <= set(kinds):
            embeddings = states.embeddings[states.group == states.prompt_ids.index(written["prompt_id"])]
            found.append(_mean_cosines(embeddings.astype(np.float64), np.array(kinds)))
    return found


def _kind(text: str, correct: bool) -> str:
    if correct:
        return "sound" if is_sound(text) else "unfaithful"
    return "slipped" if is_sound(text) else "wrong"


def _mean_cosines(embeddings: NDArray[np.float64], kinds: NDArray[np.str_]) -> NDArray[np.float64]:
    """Of each of `PAIRS`, [4]; embeddings have length 1. NaN where a kind has one response, and so no pair."""
    alike = embeddings @ embeddings.T
    np.fill_diagonal(alike, np.nan)  # a response beside itself is no pair
    blocks = (alike[np.ix_(kinds == first, kinds == second)] for first, second in PAIRS)
    return np.array([_known_means(block.reshape(-1, 1))[0] for block in blocks])


def _known_means(figures: Sequence[NDArray[np.float64]] | NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, k] -> [k]: means of what is not NaN; NaN where nothing is known."""
    known = ~np.isnan(figures)
    sums, counts = np.nansum(figures, axis=0), known.sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
