"""Groups of seeds in reports: which runs are paired, what their intervals cover, how runs are labelled."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import evaluate, write_run

from clipo_megatron.cli.report import write_page
from clipo_megatron.report.document import document
from clipo_megatron.report.endings import ending, endings_of, sentences
from clipo_megatron.report.grouping import RunGroup, group_runs
from clipo_megatron.report.pairing import pair, paired
from clipo_megatron.report.reading import read_run


def groups_of(folder: Path, solved: dict[str, dict[int, dict[int, int]]]) -> list[RunGroup]:
    """Groups by name, "grpo" without CLIPO: problems solved by seed and step."""
    runs = []
    for name, seeds in solved.items():
        for seed, by_step in seeds.items():
            run = write_run(folder / name / f"s{seed}", seed=seed, clipo=name != "grpo", name=name, steps=max(by_step))
            for step, count in by_step.items():
                evaluate(run, step, count)
            runs.append(run)
    return group_runs([read_run(run) for run in runs])


def test_intervals_of_groups_are_over_their_seeds(tmp_path):
    """Differences of 1, 2 and 6 problems of 20: 15 points with an interval of 4.303 * 13.23 / sqrt(3) points."""
    first, second = groups_of(
        tmp_path, {"grpo": {0: {12: 4}, 1: {12: 9}, 2: {12: 5}}, "clipo": {2: {12: 11}, 0: {12: 5}, 1: {12: 11}}}
    )
    (found,), notes = pair(first, second)
    assert found.difference == pytest.approx(0.15) and notes == []
    assert found.half == pytest.approx(4.303 * np.std([0.05, 0.1, 0.3], ddof=1) / math.sqrt(3), rel=1e-3)
    assert found.problems.high - found.problems.low < found.half, "over problems it is much narrower"
    text = paired([first, second])
    low, high = (f"{100 * (0.15 + sign * found.half):+.1f}".replace("-", "−") for sign in (-1, 1))
    assert f"<b>+15.0</b> <span class='main'>{low} to {high}</span>" in text
    assert "points, 95% over seeds" in text and "against grpo" in text


def test_only_seeds_of_both_groups_are_paired(tmp_path):
    grpo = {seed: {12: count} for seed, count in enumerate((20, 9, 5, 20, 4))}
    first, second = groups_of(
        tmp_path / "a", {"grpo": grpo, "clipo": {seed: {12: grpo[seed][12] + 2} for seed in (1, 2, 4)}}
    )
    (found,), notes = pair(first, second)
    assert (found.difference, found.half) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))
    assert pair(second, first)[0][0].difference == pytest.approx(-0.1)
    assert "<b>+10.0</b></td>" in paired([first, second]), "seeds that all differ alike tell of no spread"
    assert found.problems.before == pytest.approx(0.3) and notes == ["seeds 1, 2, 4, which both have."]

    first, second = groups_of(tmp_path / "b", {"grpo": {0: {12: 4}, 1: {12: 6}}, "clipo": {5: {12: 8}, 6: {12: 10}}})
    (found,), notes = pair(first, second)
    assert found.difference == pytest.approx(0.2) and "Welch" in notes[0]
    assert found.half == pytest.approx(4.303 * math.sqrt(2 * np.var([0.2, 0.3], ddof=1) / 2), rel=1e-3)

    first, second = groups_of(tmp_path / "c", {"grpo": {0: {12: 4}, 1: {12: 6}}, "clipo": {0: {12: 8}}})
    (found,), notes = pair(first, second)
    assert found.half is None and notes == []
    assert "over seeds</th>" not in paired([first, second])


def test_a_seed_in_progress_is_not_averaged_with_finished_ones(tmp_path):
    """One that was evaluated before training only says nothing; two that share a step are taken there."""
    done = {0: 4, 6: 8, 12: 12}
    groups = groups_of(
        tmp_path,
        {"grpo": dict.fromkeys(range(3), done), "clipo": {0: done, 1: {0: 0, 6: 14}}, "late": {0: done, 1: {0: 4}}},
    )
    # "late" has the settings of "clipo", so both are one group: four runs, of which three have evaluated step 6.
    assert [(group.label, len(group.runs)) for group in groups] == [("grpo", 3), ("clipo / late", 4)]
    first, second = groups
    whole, going = ending(first), ending(second)
    assert (whole.step, len(whole.runs), whole.is_last) == (12, 3, True)
    assert (going.step, len(going.runs), going.is_last) == (6, 3, False)
    one, other = endings_of(first, second)
    assert (one.step, other.step) == (6, 6), "a finished group is held against one that goes on at the latter's step"
    page = html.unescape(document(groups, made=""))
    assert "of held-out problems after 6 steps; 3 seeds, 40.0% to 70.0%" in page
    assert "of held-out problems after 12 steps; 3 seeds" in page
    left_out = next(run.label for run in second.runs if run not in going.runs)
    assert f"{left_out}: it is left out of its group's accuracy, which is that after 6 steps" in page
    assert "clipo / late: its accuracy is that after 6 steps, the last that all its runs have evaluated" in page
    assert "both after 6 steps, the last that all their runs have evaluated" in page
    assert "its last evaluation is that before training." in page
    untrained = groups_of(tmp_path / "new", {"grpo": {0: {0: 4}, 1: {0: 4}}})[0]
    assert ending(untrained).step == 0 and len(ending(untrained).runs) == 2 and sentences(untrained) == []
    apart = groups_of(tmp_path / "apart", {"grpo": {0: {0: 4, 12: 8}, 1: {0: 4, 6: 8}}})[0]
    assert ending(apart).step == 12 and [run.label for run in ending(apart).runs] == ["grpo, seed 0"]


def test_runs_with_one_name_are_told_apart(tmp_path):
    a, b = (write_run(tmp_path / "one" / f"s{seed}", seed=seed, name="small", steps=5) for seed in (0, 1))
    c = write_run(tmp_path / "two" / "s0", name="small", steps=5, learning_rate=3e-6)
    groups = group_runs([read_run(folder) for folder in (a, b, c)])
    assert [group.label for group in groups] == ["small (one)", "small (s0)"]
    assert [run.label for group in groups for run in group.runs] == [
        "small (one), seed 0", "small (one), seed 1", "small (s0)",
    ]  # fmt: skip
    page, trace = write_page([a, b, tmp_path / "two" / ".." / "two" / "s0", c], tmp_path / "page.html")
    text = html.unescape(page.read_text())
    assert "Phases: small (one), seed 0" in text and "3 runs in 2 groups" in text
    assert "small (one): 5 of 12 steps are done" in text, "a note on all runs of a group stands there once"
    named = {event["args"]["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "M"}
    assert {"small (one), seed 0", "small (one), seed 1", "small (s0)"} <= named
    d = write_run(tmp_path / "one" / "again", name="small", steps=5)
    (group,) = group_runs([read_run(folder) for folder in (a, d)])
    assert [run.label for run in group.runs] == ["small, s0", "small, again"], "the same seed twice"
