"""Fingerprints of what a run is trained on: each notices what it stands for, and nothing else."""

import json

import pytest
from safetensors.torch import load_file, save_file
from small_runs import write_config, write_model

from clipo_megatron.config.load import load
from clipo_megatron.data.prompt_table import PromptTable
from clipo_megatron.data.splits import ProblemSets
from clipo_megatron.data.tokenizer import load_tokenizer
from clipo_megatron.telemetry.segments import refusals, remarks
from clipo_megatron.training.fingerprints import fingerprints, weights_digest


@pytest.fixture
def run(tmp_path):
    return write_config(tmp_path, write_model(tmp_path / "model", layers=1))


def facts(file, *overrides):
    config = load(file, overrides)
    tokenizer = load_tokenizer(config.model.path)
    sets = ProblemSets(config, tokenizer, lambda line: None)
    held_out = sets.held_out()
    return fingerprints(config, tokenizer, train=sets.training(held_out), held_out=held_out or [])


def what_changed(before, now):
    """The fingerprints that differ, by dotted name."""
    return {
        f"{name}.{part}" if isinstance(value, dict) else name
        for name, value in now.items()
        for part, each in (value.items() if isinstance(value, dict) else [("", value)])
        if each != (before[name][part] if isinstance(value, dict) else before[name])
    }


def test_the_same_run_has_the_same_fingerprints(run):
    before = facts(run)
    assert before == json.loads(json.dumps(before)) == facts(run)
    assert (before["train"]["count"], before["eval"]["count"]) == (10, 6)


def test_other_rows_of_the_same_number_are_noticed(run, tmp_path):
    before = facts(run)
    file = tmp_path / "practice.jsonl"
    file.write_text(file.read_text().replace("Question 3?", "Question three?"))
    now = facts(run)
    assert what_changed(before, now) == {"train.questions", "train.problems", "train.tokens"}
    (remark,) = remarks(before, now)
    assert "the training problems are not those of before (they are 10 as before)" in remark


def test_another_gold_answer_is_noticed(run, tmp_path):
    before = facts(run)
    file = tmp_path / "practice.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row["reward_model"]["ground_truth"] = "8"
    file.write_text("".join([json.dumps(row) + "\n", *rest]))
    now = facts(run)
    assert what_changed(before, now) == {"train.problems"} and "other gold answers" in remarks(before, now)[0]


def test_another_template_and_system_prompt_are_noticed(run, tmp_path):
    before = facts(run)
    now = facts(run, "model.system_prompt=Brief.")
    assert what_changed(before, now) == {
        f"{part}.{name}" for part in ("train", "eval") for name in ("problems", "tokens")
    }
    assert len(remarks(before, now)) == 2 and all("rendered or tokenized" in each for each in remarks(before, now))
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert what_changed(before, facts(run)) >= {"template"}


def test_other_weights_of_the_same_shapes_are_refused(run, tmp_path):
    before = facts(run)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    now = facts(run)
    assert what_changed(before, now) == {"model.digest"}
    assert "Restore the model" in refusals(before, now)[0]


def test_moved_weights_are_the_same(run, tmp_path):
    before = facts(run)
    (tmp_path / "model").rename(tmp_path / "moved")
    now = facts(run, f"model.path={tmp_path / 'moved'}")
    assert what_changed(before, now) == {"model.path"} and refusals(before, now) == remarks(before, now) == []


def test_a_vocabulary_with_other_ids_is_refused(run, tmp_path):
    before = facts(run)
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    now = facts(run)
    assert "tokenizer" in what_changed(before, now) and "other ids" in refusals(before, now)[0]


def test_nothing_is_read_or_made_again(run, monkeypatch):
    """The cost is that of hashing numbers that lie in memory: no prompt is made, whatever their number."""
    config = load(run)
    tokenizer = load_tokenizer(config.model.path)
    sets = ProblemSets(config, tokenizer, print)
    table = sets.training(sets.held_out())
    monkeypatch.setattr(PromptTable, "row", lambda *words: pytest.fail("a prompt was made"))
    assert table.fingerprint()["count"] == 10


def test_a_folder_without_weights_has_a_digest_too(tmp_path):
    assert weights_digest(tmp_path) == weights_digest(tmp_path)
