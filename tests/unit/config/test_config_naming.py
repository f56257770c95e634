"""Runs without a name are named after their file; runs of before, which all lay in runs/run, are found or explained."""

import json
from dataclasses import asdict

import pytest

from clipo_megatron.config.differences import ABSENT, differences, plain
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import RunConfig

FILE = "model: {path: models/x}\ndata: {train: [{path: t.jsonl}]}\noptimizer: {learning_rate: 2.0e-6}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first.yaml", "second.yaml", "run.yaml"):
        (tmp_path / name).write_text(FILE)
    return tmp_path


def former_run(here, file="first.yaml", **changed):
    """A run as versions before began it: without a name, so in runs/run."""
    config = load(file, ["name=run"])
    for key, value in changed.items():
        setattr(config.optimizer, key, value)
    folder = here / "runs" / "run"
    folder.mkdir(parents=True)
    settings = asdict(config)
    del settings["rollout"]["stop_tokens"], settings["model"]["template_options"]  # which it did not know
    (folder / "config.json").write_text(json.dumps(settings, default=str))


def place(file, *overrides):
    config = load(file, overrides)
    return config.name, config.train.output


def test_two_files_have_two_folders(here):
    assert place("first.yaml") == ("first", "runs/first") and place("second.yaml") == ("second", "runs/second")
    assert place("run.yaml") == ("run", "runs/run")
    assert place("first.yaml", "name=mine") == ("mine", "runs/mine")
    assert place("first.yaml", "train.output=there") == ("first", "there")
    (here / "first.yaml").write_text(f"name: given\n{FILE}")
    assert place("first.yaml") == ("given", "runs/given")


def test_a_run_of_before_goes_on_where_it_lies(here, capsys):
    former_run(here)
    assert place("first.yaml") == ("run", "runs/run")
    said = capsys.readouterr().err
    assert "first.yaml gives no name" in said and "begun in runs/run" in said and "`name: run`" in said
    assert place("first.yaml", "train.steps=500", "checkpoint.every=7") == ("run", "runs/run"), (
        "it may go on for longer"
    )
    assert place("first.yaml", "name=mine") == ("mine", "runs/mine")


def test_another_run_of_before_is_explained(here, capsys):
    former_run(here, learning_rate=1e-3)
    assert place("first.yaml") == ("first", "runs/first")
    said = capsys.readouterr().err
    assert "runs/run holds a run of another configuration (optimizer.learning_rate and so on differ)" in said
    assert "add name=run" in said
    (here / "runs" / "first").mkdir()  # the run has begun in its own folder: nothing is to be said any more
    assert place("first.yaml") == ("first", "runs/first") and capsys.readouterr().err == ""


def test_a_damaged_or_foreign_folder_is_left_alone(here, capsys):
    (here / "runs" / "run").mkdir(parents=True)
    for text in ("{", "[]", '{"architectures": []}', '{"data": 1, "train": 2, "name": "other"}'):
        (here / "runs" / "run" / "config.json").write_text(text)
        assert place("first.yaml") == ("first", "runs/first")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- differences


def test_settings_that_differ_are_listed_with_both_values(here):
    before = plain(load("first.yaml", ["sglang={a: 1, b: 2}", "data.eval=[{path: e.jsonl}]"]))
    now = plain(load("first.yaml", ["optimizer.learning_rate=1e-3", "sglang={a: 3}", "data.train[0].size=9"]))
    found = {each.key: (each.before, each.now) for each in differences(before, now)}
    assert found.pop("optimizer.learning_rate") == (2e-6, 1e-3)
    assert found.pop("sglang.a") == (1, 3) and found.pop("sglang.b") == (2, ABSENT)
    assert found.pop("data.train[0].size") == (None, 9)
    assert found.pop("data.eval[0].path") == ("e.jsonl", ABSENT)
    assert all(key.startswith("data.eval[0].") for key in found)
    assert differences(now, now) == []


def test_settings_of_another_version_are_compared_as_far_as_both_know_them(here):
    now = plain(load("first.yaml"))
    before = json.loads(json.dumps(now))
    before["faults"]["stop_s"] = before["faults"].pop("grace_period_s")  # an old name
    before["train"]["forgotten"] = 7  # a setting that is gone
    del before["model"]["template_options"], before["rollout"]["stop_tokens"]  # settings that are new
    assert differences(before, now) == []
    now["model"]["template_options"] = {"enable_thinking": False}
    assert [tuple(each) for each in differences(before, now)] == [
        ("model.template_options.enable_thinking", ABSENT, False)
    ]


def test_a_configuration_reads_as_its_file_does(here):
    config = RunConfig()
    assert plain(config) == json.loads(json.dumps(asdict(config), default=str))
