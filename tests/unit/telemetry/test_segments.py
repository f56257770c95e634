"""The sessions of a run: what each was configured with, and what a later one says about an earlier one."""

import json

import pytest
from paths import ROOT

from clipo_megatron.config.differences import plain
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.runtime.run_dir import set_aside
from clipo_megatron.telemetry.segments import (
    RunSegment,
    add_segment,
    changes,
    read_segments,
    refusals,
    remarks,
    segment_before,
)

FACTS = {
    "model": {"path": "models/x", "digest": "a"},
    "tokenizer": "b",
    "template": "c",
    "train": {"count": 12, "questions": "d", "problems": "D", "tokens": "e"},
    "eval": {"count": 8, "questions": "f", "problems": "F", "tokens": "g"},
}


def settings(rate):
    config = RunConfig()
    config.optimizer.learning_rate = rate
    return plain(config)


def test_every_session_keeps_its_settings(tmp_path):
    for step, rate in ((0, 1e-6), (3, 2e-6), (5, 4e-6)):
        add_segment(tmp_path, step, settings(rate), FACTS)
    found = read_segments(tmp_path)
    assert [each.step for each in found] == [0, 3, 5] and all(each.started for each in found)
    assert [each.settings["optimizer"]["learning_rate"] for each in found] == [1e-6, 2e-6, 4e-6]
    assert found[0].fingerprints == FACTS
    (change,) = changes(found[0], found[1].settings)
    assert change == ("optimizer.learning_rate", 1e-6, 2e-6)


def test_a_session_whose_steps_are_repeated_is_dropped(tmp_path):
    for step in (0, 3, 5):
        add_segment(tmp_path, step, settings(step + 1.0), FACTS)
    add_segment(tmp_path, 3, settings(9.0), FACTS)  # resumed from an older checkpoint
    found = read_segments(tmp_path)
    assert [each.settings["optimizer"]["learning_rate"] for each in found] == [1.0, 9.0]


def test_the_session_that_made_a_step_is_found(tmp_path):
    assert segment_before(tmp_path, 3) is None
    for step in (0, 3):
        add_segment(tmp_path, step, settings(step + 1.0), FACTS)
    rate = {step: segment_before(tmp_path, step).settings["optimizer"]["learning_rate"] for step in (0, 1, 3, 4, 9)}
    assert rate == {0: 4.0, 1: 1.0, 3: 1.0, 4: 4.0, 9: 4.0}  # the second session made no step before step 4


def test_of_a_run_of_before_the_last_settings_are_known():
    found = segment_before(ROOT / "tests" / "fixtures" / "older_run" / "run", 2)
    assert found.step == 0 and "train" in found.settings
    assert found.fingerprints == {} and refusals(found.fingerprints, FACTS) == remarks(found.fingerprints, FACTS) == []


def test_a_damaged_file_hides_nothing_else(tmp_path):
    add_segment(tmp_path, 0, settings(1.0), FACTS)
    with (tmp_path / "segments.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"step": 4, "settings": []}\n{"step": 5, "sett')
    assert [each.step for each in read_segments(tmp_path)] == [0]


def test_starting_over_puts_the_sessions_aside(tmp_path):
    add_segment(tmp_path, 0, settings(1.0), FACTS)
    assert (set_aside(tmp_path) / "segments.jsonl").exists() and read_segments(tmp_path) == []


def changed(path, value):
    facts = json.loads(json.dumps(FACTS))
    *parents, last = path.split(".")
    place = facts
    for name in parents:
        place = place[name]
    place[last] = value
    return facts


@pytest.mark.parametrize(
    ("path", "value", "refused", "remarked"),
    [
        ("model.digest", "z", "the weights at model.path = models/x are not those", ""),
        ("model.path", "moved", "", ""),
        ("tokenizer", "z", "the tokenizer gives tokens other ids", ""),
        ("template", "z", "", "the chat template is another one than before"),
        ("train.questions", "z", "", "the training problems are not those of before (they are 12 as before)"),
        ("train.tokens", "z", "", "are rendered or tokenized differently"),
        ("eval.questions", "z", "", "the evaluation problems are not those of before"),
        ("train.problems", "z", "", "have other gold answers"),
        ("train.count", 12, "", ""),
    ],
)
def test_what_changed_is_refused_or_said(path, value, refused, remarked):
    now = changed(path, value)
    for sentences, expected in ((refusals(FACTS, now), refused), (remarks(FACTS, now), remarked)):
        assert len(sentences) == bool(expected) and all(expected in each for each in sentences)
    assert RunSegment(0, {}).fingerprints == {} and refusals({}, now) == remarks({}, now) == []


def test_another_template_changes_the_tokens_too_and_is_said_once():
    now = changed("template", "z")
    now["train"]["tokens"] = now["eval"]["tokens"] = "z"
    assert len(remarks(FACTS, now)) == 1
