"""Manifests of checkpoints that somebody has written by hand: each is refused in a sentence with the field."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest

from clipo_megatron.checkpoint.retention import complete, defect, sweep
from clipo_megatron.runtime.manifest import FORMAT, ManifestError, changed_file, manifest_defects, read_manifest

CONTENT = b"weights"
ENTRY = {"bytes": len(CONTENT), "crc32": zlib.crc32(CONTENT)}


def step(folder: Path, text: object = None, **fields: object) -> Path:
    """A checkpoint of step 3 with one file; `text` replaces its manifest, or else `fields` what stands in it."""
    checkpoint = folder / "step_000003"
    checkpoint.mkdir()
    (checkpoint / "file").write_bytes(CONTENT)
    manifest = {"format": 1, "step": 3, "world": 1, "files": {"file": ENTRY}} | fields
    (checkpoint / "manifest.json").write_text(json.dumps(manifest) if text is None else str(text))
    return checkpoint


def test_a_complete_checkpoint_has_no_defect_and_one_of_before_formats_neither(tmp_path):
    checkpoint = step(tmp_path)
    assert (defect(checkpoint), changed_file(checkpoint), manifest_defects(checkpoint)) == ("", "", [])
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 3, "files": {"file": ENTRY}}))
    assert complete(tmp_path) == [checkpoint]


def test_a_checkpoint_of_a_later_release_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ManifestError, match=rf"has format = {FORMAT + 1}, .*up to format {FORMAT}\. Use the release"):
        read_manifest(step(tmp_path, format=FORMAT + 1))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"step": float("inf")}, "has step = inf"),
        ({"step": float("nan")}, "has step = nan"),
        ({"step": True}, "has step = true"),
        ({"world": "two"}, "has world = two"),
        ({"format": 1.0}, "has format = 1.0"),
        ({"model": ["x"]}, "has model = ['x'], and a mapping is needed"),
        ({"files": ["file"]}, "has files = ['file'], and a mapping of names is needed"),
        ({"files": {"file": 5}}, "has bytes = null for file in files"),
        ({"files": {"file": {"bytes": 7}}}, "has crc32 = null for file in files"),
        ({"files": {"file": ENTRY | {"bytes": -1}}}, "has bytes = -1 for file"),
        ({"files": {"file": ENTRY | {"bytes": 1e400}}}, "has bytes = inf for file"),
        ({"files": {"file": ENTRY | {"crc32": 2**32}}}, "has crc32 = 4294967296 for file"),
        ({"files": {"/etc/passwd": ENTRY}}, "a name in files that is none of a file in the checkpoint: /etc/passwd"),
        ({"files": {"policy/../../x": ENTRY}}, "a name in files that is none"),
        ({"files": {"": ENTRY}}, "a name in files that is none"),
        ({"files": {"a\0b": ENTRY}}, "a name in files that is none"),
        ({"files": {"\ud800": ENTRY}}, "a name in files that is none"),
        ({"files": {"n" * 10_000: ENTRY}}, "a name in files that is none"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, fields, reason):
    checkpoint = step(tmp_path, **fields)
    assert reason in defect(checkpoint) and complete(tmp_path) == []
    assert changed_file(checkpoint) == defect(checkpoint)
    assert manifest_defects(checkpoint) == [f"{checkpoint} is no complete checkpoint: {defect(checkpoint)}"]
    assert len(defect(checkpoint)) < 300


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "cannot be read (maximum recursion depth"),
        ('{"step": ' + "9" * 5000 + "}", "cannot be read (Exceeds the limit"),
        ("[1]", "holds a list and no fields"),
        ("", "cannot be read (Expecting value"),
    ],
)
def test_a_text_that_is_no_manifest_is_named(tmp_path, text, reason):
    assert defect(step(tmp_path, text)).startswith(f"manifest.json {reason}")


def test_pipes_and_devices_in_place_of_files_do_not_block(tmp_path):
    checkpoint = step(tmp_path)
    (checkpoint / "file").unlink()
    os.mkfifo(checkpoint / "file")
    assert defect(checkpoint) == "file is missing"
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")
    assert defect(checkpoint) == "manifest.json cannot be read (it is a device or a pipe)"


def test_only_what_a_run_left_unfinished_is_swept_away(tmp_path):
    for name in (".step_000001.partial", ".step_000002.removed", ".step_notes", ".step_000003.mine"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_000003.mine", ".step_notes"]
