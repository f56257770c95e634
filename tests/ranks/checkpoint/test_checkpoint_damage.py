"""Damage to a checkpoint is noticed and named, and an older one is used."""

import os
import shutil
from pathlib import Path

import pytest
from checkpoint_cases import failure, newest, saved, saved_quietly

from clipo_megatron.config.model_folder import POLICY


def refused_latest(folder):
    return failure(newest, folder)


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(ranks, tmp_path):
    ranks.run(saved_quietly, 1, tmp_path, [3])
    checkpoints = tmp_path / "checkpoints"
    # killed before the rename, even with a manifest; and killed while deleting an old one
    shutil.copytree(checkpoints / "step_000003", checkpoints / ".step_000006.partial")
    shutil.copytree(checkpoints / "step_000003", checkpoints / ".step_000002.removed")
    (checkpoints / "step_notes").mkdir()
    (checkpoints / "step_000007").write_text("a file")
    assert ranks.run(newest, 1, tmp_path) == [("step_000003", [])]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000003", "step_000007", "step_notes"]


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (cut, "policy/weights.1.bin", "policy/weights.1.bin has 8191 bytes, 8192 were written"),
        (flip, "policy/weights.0.bin", "the bytes of policy/weights.0.bin are not those that were written"),
        (flip, "head.safetensors", "the bytes of head.safetensors are not those that were written"),
        (Path.unlink, "sampler.1.json", "sampler.1.json is missing"),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
        (cut, "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(ranks, tmp_path, damage, file, reason):
    ranks.run(saved_quietly, 2, tmp_path, [3, 6])
    damage(tmp_path / "checkpoints" / "step_000006" / file)
    for name, said in ranks.run(newest, 2, tmp_path):
        assert name == "step_000003"
        (message,) = said
        assert message.startswith(f"warning: {tmp_path / 'checkpoints' / 'step_000006'} is damaged: {reason}")
        assert message.endswith("looking for an older checkpoint")
    # the run comes by this step again and replaces what is damaged
    ranks.run(saved_quietly, 2, tmp_path, [6])
    assert ranks.run(newest, 2, tmp_path) == [("step_000006", [])] * 2


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(ranks, tmp_path):
    assert ranks.run(newest, 1, tmp_path) == [(None, [])]
    ranks.run(saved_quietly, 1, tmp_path, [3])
    cut(tmp_path / "checkpoints" / "step_000003" / "head.json")
    ((kind, message),) = ranks.run(refused_latest, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000003 is damaged: head.json has" in message
    assert "checkpoint.resume=false" in message


def load_flipped(folder):
    checkpoints = saved(folder, [3])
    flip(checkpoints.folder / "step_000003" / "policy" / ".metadata")
    checkpoints.contents.models[POLICY].load = lambda folder: pytest.fail("it was read")
    return failure(checkpoints.load, checkpoints.folder / "step_000003")


def test_a_changed_pickle_is_not_read(ranks, tmp_path):
    ((kind, message),) = ranks.run(load_flipped, 1, tmp_path)
    assert kind == "CheckpointError"
    assert "step_000003 is damaged: the bytes of policy/.metadata are not those that were written" in message
