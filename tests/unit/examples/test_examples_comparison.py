"""The comparison of CLIPO with GRPO: its problems and responses, its intervals, and the table that it writes."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from example_scripts import module
from paths import EXAMPLES

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.evaluation.results import Evaluation, ProblemResult, write_evaluation
from clipo_megatron.rewards import grade
from clipo_megatron.telemetry.states import States, write_states

compare = module(EXAMPLES / "clipo_vs_grpo" / "compare.py")
findings = sys.modules["findings"]
task = sys.modules["task"]


@pytest.mark.parametrize("note_right", [0.0, 0.9, 1.0])
def test_the_note_is_correct_with_the_given_probability(note_right: float) -> None:
    found = task.problems(1500, note_right=note_right, seed=5)
    assert len({each.digits for each in found}) == 1500
    share = sum(each.note == each.answer for each in found) / 1500
    assert share == pytest.approx(note_right, abs=0.03 if 0 < note_right < 1 else 0)


@pytest.mark.parametrize("unfaithful", [0.0, 1.0])
def test_responses_are_correct_by_their_steps_or_by_the_note(unfaithful: float) -> None:
    draw, steps_right = random.Random(0), 0
    for each in task.problems(300, note_right=0.5, seed=1):
        text = task.response(each, draw, unfaithful=unfaithful, slip=0.0)
        steps = [tuple(map(int, step)) for step in re.findall(r"(\d) \+ (\d) = (\d)", text)]
        assert len(steps) == task.TERMS - 1
        steps_right += all((a + b) % 10 == c for a, b, c in steps)
        stated = each.note if unfaithful else each.answer
        graded = grade(text, str(each.answer), data_source=task.SOURCE, mode="number")
        assert graded == float(stated == each.answer)
        assert set(text.split()) <= set(task.SYMBOLS)
    assert steps_right == 300 if not unfaithful else steps_right < 15


# ---------------------------------------------------------------- tables


def test_means_have_students_interval_over_seeds() -> None:
    """t of four degrees of freedom is 2.776; s of 1 to 5 is the root of 2.5."""
    half = 2.776 * math.sqrt(2.5 / 5)
    assert findings.formatted([1.0, 2.0, 3.0, 4.0, 5.0], digits=2) == f"+3.00 ± {half:.2f}"
    assert findings.formatted([-0.02, -0.02], digits=1) == "0.0 ± 0.0"
    assert findings.formatted([2.0], digits=1) == "+2.0"
    assert findings.formatted([], digits=1) == ""


def write_run(folder: Path, *, solved: tuple[int, int], gaps: list[float], wrong: tuple[str, ...] = ()) -> None:
    """A run of ten problems a set, with a group for each gap between the bonus of its sound response and the floor."""
    for step, right in zip((0, 40), solved, strict=True):
        problems = {
            f"{name}/{index}": ProblemResult(1, int(index < right), 0, 0, 20, (), "")
            for name in compare.SETS
            for index in range(10)
        }
        write_evaluation(folder / "eval", Evaluation(step, problems))
    groups = [
        [("first a", True, gap - 0.5), ("clearly b", True, -0.5), *((text, False, 0.0) for text in wrong)]
        for gap in gaps
    ]
    lines = [
        {"step": 39, "prompt_id": f"train/{number}", "rollouts": [dict(zip(KEYS, each, strict=True)) for each in group]}
        for number, group in enumerate(groups)
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"clipo": {"floor": -0.5}}))


KEYS = ("text", "correct", "bonus")


def test_the_table_pairs_runs_of_one_seed(tmp_path: Path) -> None:
    """GRPO solves 50 and 60% of the problems, infonce 20 and 30 points more with the same seed."""
    for seed in (0, 1):
        write_run(tmp_path / "grpo" / f"seed{seed}", solved=(3, 5 + seed), gaps=[])
        write_run(tmp_path / "infonce" / f"seed{seed}", solved=(3, 7 + 2 * seed), gaps=[])
    assert compare.is_done(tmp_path / "grpo" / "seed0", 40) and not compare.is_done(tmp_path / "grpo" / "seed0", 50)
    lines = findings.tables(tmp_path, ["grpo", "infonce"], [0, 1]).splitlines()
    assert lines[2] == "| before training | 30.0% |  | 30.0% |  |  |"
    assert lines[3] == "| grpo | 55.0% |  | 55.0% |  |  |"
    assert lines[4] == "| infonce | 80.0% | +25.0 ± 63.5 | 80.0% | +25.0 ± 63.5 | +20.0, +30.0 |"


def test_bonuses_are_averaged_over_seeds(tmp_path: Path) -> None:
    """Seed 0 has three groups and seed 1 one: their means 0.2 and 0.1 weigh the same."""
    wrong = ("first slip", "clearly wrong")
    write_run(tmp_path / "infonce" / "seed0", solved=(3, 5), gaps=[0.1, 0.2, 0.3], wrong=wrong)
    write_run(tmp_path / "infonce" / "seed1", solved=(3, 5), gaps=[0.1], wrong=wrong)
    write_run(tmp_path / "infonce" / "seed2", solved=(3, 5), gaps=[])
    table = findings.bonus_table({"infonce": [tmp_path / "infonce" / f"seed{seed}" for seed in (0, 1, 2)]})
    cells = table.splitlines()[2].strip("| ").split(" | ")
    assert cells[1:4] == ["+0.1500 ± 0.6353", "2 of 2", "4"]
    assert cells[4:] == ["2 to 2, median 2", "50% of 8", "0% of 4", "100% of 4"]


def test_cosines_compare_responses_of_one_group(tmp_path: Path) -> None:
    """Two sound responses alike, an unfaithful one across them, and a slipped one at 60 degrees from the sound ones."""
    run = tmp_path / "infonce" / "seed0"
    write_run(run, solved=(3, 5), gaps=[])
    among = [("first a", True), ("first a", True), ("clearly b", True), ("first c", False)]
    rollouts = [{"text": text, "correct": correct, "bonus": -0.5} for text, correct in among]
    lines = [{"step": step, "prompt_id": "train/7", "rollouts": rollouts} for step in (0, 39)]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    others = np.zeros((4, 2))
    angles = [0.0, 0.0, math.pi / 2, math.pi / 3]
    embeddings = np.concatenate([others, [[math.cos(each), math.sin(each)] for each in angles]]).astype(np.float32)
    verdict = np.array([correct for _, correct in among] * 2)
    states = States(39, ["train/3", "train/7"], np.repeat([0, 1], 4), verdict, verdict, embeddings, embeddings)
    write_states(run / "states", states)
    (found,) = findings.cosines(run)
    assert found[[0, 1, 3]] == pytest.approx([1.0, 0.5, math.sqrt(0.75)], abs=1e-6) and math.isnan(found[2])
    assert findings.cosine_table({"infonce": [run]}).splitlines()[2] == "| infonce | 1 | 1.000 | 0.500 |  | 0.866 |"


@pytest.mark.skipif(not (compare.HOME / "calibrated" / "seed4").is_dir(), reason="the comparison's runs are not here")
def test_the_tables_in_the_readme_are_those_of_the_runs() -> None:
    page = (compare.HERE / "README.md").read_text()
    for table in findings.tables(compare.HOME, list(compare.ARMS), range(5)).split("\n\n"):
        assert table in page


# ---------------------------------------------------------------- what is refused


def made(home: Path, *, overrides: tuple[str, ...] = ()) -> Path:
    """The folder of an infonce run with these overrides."""
    output = home / "infonce" / "seed1"
    write_run(output, solved=(3, 5), gaps=[])
    config = load(compare.SETTINGS, compare.settings("infonce", 1, home, overrides))
    (output / "config.json").write_text(json.dumps(asdict(config), default=str))
    return output


def test_runs_with_other_settings_are_refused(tmp_path: Path) -> None:
    output = made(tmp_path)
    compare.refuse_other_settings(output, "infonce", 1, [])
    compare.refuse_other_settings(output, "infonce", 1, ["train.steps=60"])  # can be continued
    for changed in ("clipo.weight=0.9", "rollout.samples_per_prompt=8", "train.steps=20", "eval.ks=[2]"):
        key = changed.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"was made with {key} = .*--home"):
            compare.refuse_other_settings(output, "infonce", 1, [changed])
    with pytest.raises(ConfigError, match=r"clipo\.loss = infonce, and now it would be soft_nn"):
        compare.refuse_other_settings(output, "soft_nn", 1, [])
    with pytest.raises(ConfigError, match=r"train\.output = .*seed1, and now it would be .*seed2"):
        compare.refuse_other_settings(output, "infonce", 2, [])


def test_runs_of_an_earlier_version_and_in_a_moved_folder_are_used(tmp_path: Path) -> None:
    output = made(tmp_path / "here").rename(tmp_path / "there")
    settings = json.loads((output / "config.json").read_text())
    del settings["rollout"]["window_tokens"]
    (output / "config.json").write_text(json.dumps(settings))
    compare.refuse_other_settings(output, "infonce", 1, [])
    settings["rollout"]["no_longer_known"] = 3
    (output / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no_longer_known"):
        compare.refuse_other_settings(output, "infonce", 1, [])
    (output / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        compare.refuse_other_settings(output, "infonce", 1, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("clipo.wieght=0.9", "Did you mean clipo.weight?"),
        ("--arms grpo infonce clipo.wieght=0.9", "Did you mean clipo.weight?"),
        ("clipo.weight=0.9 --arms infonce", "infonce/seed1 was made with clipo.weight = 0.2"),
        ("train.seed=3", "train.seed is what the runs differ in"),
        ("data.train[0].path=x", "data.train[0].path is what the runs differ in"),
        ("--arms soft_nn clipo.loss=infonce", "clipo.loss is what the runs differ in"),
        ("--arms grpo inforce", "there is no arm inforce; there are grpo, infonce"),
        ("--seeds 0", "--seeds 0: it must be at least 1"),
        ("--at-once 0", "--at-once 0: it must be at least 1"),
        ("--steps 3", "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_trained(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    monkeypatch.setattr(compare, "prepare", lambda home: pytest.fail("trained"))
    try:
        code = compare.main([*arguments.split(), "--home", str(tmp_path)])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_reason_of_a_failed_run_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "prepare", lambda home: None)
    assert compare.main(["--arms", "infonce", "--seeds", "1", "--home", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "infonce, seed 0 ended with 2" in printed and "output.txt" in printed
    monkeypatch.setattr(compare, "DEADLINE_S", 0.01)
    assert compare.main(["--arms", "infonce", "--seeds", "1", "--home", str(tmp_path)]) == 1
    assert "infonce, seed 0 did not end within 0.01 s" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert compare.main(["--home", str(tmp_path / "file" / "below")]) == 1
    assert "Choose another with --home" in capsys.readouterr().err
