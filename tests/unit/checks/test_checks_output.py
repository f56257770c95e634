"""The folder that a run writes to: what is somebody else's is neither overwritten nor mixed with results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clipo_megatron.checks.output import output_problems
from clipo_megatron.config.schema import RunConfig, SourceConfig

OURS = json.dumps({"data": {}, "train": {}})


def reasons(output: Path, **changes: object) -> list[str]:
    config = RunConfig()
    config = replace(config, train=replace(config.train, output=str(output)), **changes)
    return [problem.reason for problem in output_problems(config)]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints", "eval", "rollouts.jsonl"])
def test_what_no_run_has_written_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("{}") if "." in name else (tmp_path / name).mkdir()
    (reason,) = reasons(tmp_path)
    assert reason == f"it holds {name}, which no run has written there and this one would overwrite"


@pytest.mark.parametrize("mark", [".lock", "segments.jsonl", "config.json"])
def test_a_run_goes_on_in_its_own_folder(tmp_path, mark):
    for name in ("metrics.jsonl", "checkpoints"):
        (tmp_path / name).touch()
    (tmp_path / mark).write_text(OURS)
    assert not reasons(tmp_path)


def test_new_folders_and_folders_with_other_files_are_used(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "logs").mkdir()
    assert not reasons(tmp_path) and not reasons(tmp_path / "new" / "run")


def test_folders_of_models_checkpoints_repositories_and_people_are_refused(tmp_path, monkeypatch):
    model = tmp_path / "model"
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    (tmp_path / "step" / "policy").mkdir(parents=True)
    (tmp_path / "step" / "policy" / "metadata.json").touch()
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    of_model = replace(RunConfig().model, path=str(model))
    assert reasons(tmp_path / "link", model=of_model) == ["it is the model's folder, model.path"]
    assert reasons(tmp_path / "repository") == ["it is the root of a repository"]
    assert reasons(tmp_path / "step" / "hf") == [f"it is in a checkpoint, {tmp_path / 'step'}"]
    for place in (Path("/"), tmp_path / "home"):
        assert reasons(place) == ["it is the home folder, or the root of the file system"]


def test_a_file_that_is_read_is_not_written(tmp_path):
    data = replace(RunConfig().data, train=[SourceConfig(path=str(tmp_path / "rollouts.jsonl"))])
    (tmp_path / ".lock").touch()
    (reason,) = reasons(tmp_path, data=data)
    assert reason.startswith("the run would write its rollouts.jsonl over ")


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\x1bb"])
def test_control_characters_are_refused(name):
    assert reasons(Path(name)) == ["it has a control character, such as the end of a line"]


@pytest.mark.parametrize("name", ["", ".", "below/.."])
def test_the_current_folder_is_one_of_its_own_only_if_a_run_has_begun_there(name, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reasons(Path(name)) == ["it is the current folder, in which no run has written yet"]
    (tmp_path / "segments.jsonl").touch()
    assert not reasons(Path(name))
