"""The comparison of CLIPO with GRPO: its problems and responses, its intervals, and the table that it writes."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
from example_scripts import EXAMPLES, module

from clipo_megatron.evaluation.results import Evaluation, ProblemResult, write_evaluation
from clipo_megatron.rewards import grade

compare = module(EXAMPLES / "clipo_vs_grpo" / "compare.py")
task = module(EXAMPLES / "clipo_vs_grpo" / "task.py")


@pytest.mark.parametrize("note_right", [0.0, 0.9, 1.0])
def test_the_note_is_right_as_often_as_asked(note_right: float) -> None:
    found = task.problems(1500, note_right=note_right, seed=5)
    assert len({each.digits for each in found}) == 1500
    share = sum(each.note == each.answer for each in found) / 1500
    assert share == pytest.approx(note_right, abs=0.03 if 0 < note_right < 1 else 0)


@pytest.mark.parametrize("unfaithful", [0.0, 1.0])
def test_responses_are_right_for_the_reason_they_give_or_for_the_note(unfaithful: float) -> None:
    draw, steps_right = random.Random(0), 0
    for each in task.problems(300, note_right=0.5, seed=1):
        text = task.response(each, draw, unfaithful=unfaithful, slip=0.0)
        steps = [tuple(map(int, step)) for step in re.findall(r"(\d) \+ (\d) = (\d)", text)]
        assert len(steps) == task.TERMS - 1
        steps_right += all((a + b) % 10 == c for a, b, c in steps)
        said = each.note if unfaithful else each.answer
        graded = grade(text, str(each.answer), data_source=task.SOURCE, mode="number")
        assert graded == float(said == each.answer)
        assert set(text.split()) <= set(task.SYMBOLS)
    assert steps_right == 300 if not unfaithful else steps_right < 15


def test_intervals_are_students() -> None:
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-3)
    assert compare.interval([2.0]) == (2.0, math.inf)


def test_the_table_pairs_runs_of_one_seed(tmp_path: Path) -> None:
    """GRPO solves 50 and 60% of the perturbed problems, infonce 20 points more with each seed."""
    for arm, gain in (("grpo", 0), ("infonce", 2)):
        for seed in (0, 1):
            for step, solved in ((0, 3), (40, 5 + seed + gain)):
                problems = {
                    f"{name}/{index}": ProblemResult(1, int(index < solved), 0, 0, 20, (), "")
                    for name in compare.SETS
                    for index in range(10)
                }
                write_evaluation(tmp_path / arm / f"seed{seed}" / "eval", Evaluation(step, problems))
            paid = [("first a", True, 0.2), ("clearly b", True, 0.1 * seed), ("first c", False, 0.0)]
            group = {"rollouts": [dict(zip(("text", "correct", "bonus"), each, strict=True)) for each in paid]}
            (tmp_path / arm / f"seed{seed}" / "rollouts.jsonl").write_text("\n".join([json.dumps(group)] * 2))
    assert compare.is_done(tmp_path / "grpo" / "seed0", 40) and not compare.is_done(tmp_path / "grpo" / "seed0", 50)
    lines = compare.table(tmp_path, ["grpo", "infonce"], [0, 1]).splitlines()
    assert lines[2].startswith("| before training | 30.0% |  | 30.0% |  | |")
    assert lines[3] == "| grpo | 55.0% |  | 55.0% |  | +0.1000 (± 0.0000) |"
    assert lines[4] == "| infonce | 75.0% | +20.0 ± 0.0 | 75.0% | +20.0 ± 0.0 | +0.1000 (± 0.0000) |"
