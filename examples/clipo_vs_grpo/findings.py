"""Tables of README.md from the runs: accuracies, bonuses of sound and unfaithful responses, and cosines of the head.

Every figure is a mean over seeds, and every "±" half the width of its 95% interval over seeds.
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
    """All tables as Markdown; those on the bonus only where there was one."""
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
            cells.append(formatted(differences, digits=1))
        by_seed = ", ".join(f"{each:+.1f}" for each in differences)  # of the last set
        lines.append(_row(arm, *cells, by_seed))
    return "\n".join(lines)


def accuracies(output: Path) -> dict[str, tuple[float, float]]:
    """Accuracy of a run on each set, before the first step and after the last."""
    found = read_evaluations(output / EVALUATIONS)
    before, after = found[0].by_source(), found[-1].by_source()
    return {name: (before[name], after[name]) for name in SETS}


def formatted(figures: Sequence[float], *, digits: int) -> str:
    """The mean over seeds with its 95% interval; a single seed has no interval, and no seed gives an empty text."""
    if not figures:
        return ""
    mean, half = interval(figures)
    signed = f"{mean:+.{digits}f}" if round(mean, digits) else f"{0:.{digits}f}"
    return signed if math.isinf(half) else f"{signed} ± {half:.{digits}f}"


# ---------------------------------------------------------------- bonuses


@dataclass(frozen=True)
class BonusGroup:
    """A recorded group in which sound and unfaithful correct responses got a bonus."""

    sound: list[float]  # bonuses of sound correct responses
    unfaithful: list[float]  # bonuses of unfaithful correct responses
    wrong: list[str]  # texts of wrong responses

    @property
    def gap(self) -> float:
        """Mean bonus of the sound responses minus that of the unfaithful ones."""
        return statistics.fmean(self.sound) - statistics.fmean(self.unfaithful)


def bonus_groups(output: Path) -> list[BonusGroup]:
    """The groups of a run in which both kinds got a bonus."""
    found = []
    for rollouts in _groups(output):
        with_bonus = [each for each in rollouts if each["correct"] and each.get("bonus")]
        sound = [each["bonus"] for each in with_bonus if is_sound(each["text"])]
        unfaithful = [each["bonus"] for each in with_bonus if not is_sound(each["text"])]
        if sound and unfaithful:
            found.append(BonusGroup(sound, unfaithful, [each["text"] for each in rollouts if not each["correct"]]))
    return found


def _groups(output: Path) -> Iterator[list[dict[str, Any]]]:
    for line in (output / ROLLOUTS).read_text().splitlines():
        yield json.loads(line)["rollouts"]


def bonus_table(folders: dict[str, list[Path]]) -> str:
    """The difference of the bonuses of sound and unfaithful responses of one group, and facts about these groups."""
    lines = [
        "| arm | bonus, sound - unfaithful | seeds that pay sound more | groups | correct rollouts | wrong ones "
        "that are sound | at the floor: sound | at the floor: unfaithful |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, runs in folders.items():
        by_run = [found for each in runs if (found := bonus_groups(each))]
        if not by_run:
            continue
        gaps = [statistics.fmean(group.gap for group in found) for found in by_run]
        groups = [group for found in by_run for group in found]
        correct = [len(group.sound) + len(group.unfaithful) for group in groups]
        floor = json.loads((runs[0] / SETTINGS).read_text())["clipo"]["floor"]
        lines.append(
            _row(
                arm,
                formatted(gaps, digits=4),
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
    """The share of true values and their number; empty where there are none."""
    return f"{statistics.fmean(found):.0%} of {len(found)}" if found else ""


# ---------------------------------------------------------------- cosines

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
    """Mean cosines [4] of each of `PAIRS`, for each group of the last recorded step that holds all three kinds."""
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
    """Mean cosine of each of `PAIRS`, [4], from unit embeddings [n, d]; NaN where there is no such pair."""
    alike = embeddings @ embeddings.T
    np.fill_diagonal(alike, np.nan)  # a response does not pair with itself
    blocks = (alike[np.ix_(kinds == first, kinds == second)] for first, second in PAIRS)
    return np.array([_known_means(block.reshape(-1, 1))[0] for block in blocks])


def _known_means(figures: Sequence[NDArray[np.float64]] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Means [k] over the rows of [n, k] that are not NaN; NaN where all are."""
    known = ~np.isnan(figures)
    sums, counts = np.nansum(figures, axis=0), known.sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
