"""`.metadata` of checkpoints: what the format needs is read, and a pickle that names code is refused before it runs."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from clipo_megatron.runtime.durable_files import FolderWriter
from clipo_megatron.runtime.manifest import ManifestError
from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.formats import metadata
from clipo_megatron.weights.formats.archive import write_tensor
from clipo_megatron.weights.formats.metadata import read_metadata
from clipo_megatron.weights.formats.torch_dist import TorchDist
from clipo_megatron.weights.formats.torch_dist_writer import FileSpan, metadata_files, torch_save_bytes

FILESYSTEM = "torch.distributed.checkpoint.filesystem"
NAMES = [  # module, name of what would touch a file if it were called with the shell's words
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "getoutput"),
    (FILESYSTEM, "os.system"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.distributed.checkpoint.planner", "io.os.system"),
    ("torch", "os.system"),
    ("torch.serialization", "os.system"),
    ("pathlib", "os.system"),
    ("collections", "_sys.modules"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.utils", "os.system"),
]


def checkpoint(folder: Path, pickled: bytes | None = None) -> Path:
    """Write a checkpoint of one tensor, with a manifest that fits; returns its policy's folder."""
    (folder / "policy").mkdir(parents=True)
    files = FolderWriter(folder)
    with files.open("policy/__0_0.distcp") as file:
        write_tensor(torch.arange(6.0), file)
    place = FileSpan("weight", "__0_0.distcp", 0, file.nbytes, (0,), (6,), (6,), torch.float32)
    for name, data in metadata_files([place], torch_save_bytes({})).items():
        files.write(f"policy/{name}", pickled if pickled and name == ".metadata" else data)
    files.write("manifest.json", json.dumps({"files": files.written}))
    return folder / "policy"


def call(module: str, name: str, argument: str, protocol: int) -> bytes:
    """A pickle that calls something with one word, by the opcodes of a protocol."""
    word = b"X" + len(argument).to_bytes(4, "little") + argument.encode()
    if protocol < 4:
        return b"c" + f"{module}\n{name}\n".encode() + word + b"\x85R."
    texts = b"".join(b"X" + len(each).to_bytes(4, "little") + each.encode() for each in (module, name))
    return b"\x80\x04" + texts + b"\x93" + word + b"\x85R."


@pytest.mark.parametrize("flipped", [False, True])
def test_metadata_is_compared_with_the_manifest_before_it_is_unpickled(tmp_path, monkeypatch, flipped):
    folder, unpickled, reader = checkpoint(tmp_path), [], metadata._MetadataUnpickler
    monkeypatch.setattr(metadata, "_MetadataUnpickler", lambda file: unpickled.append(1) or reader(file))
    if flipped:
        content = bytearray((file := folder / ".metadata").read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ManifestError, match=r"policy/\.metadata is damaged: its bytes are not those"):
            TorchDist(folder)
        assert not unpickled
    else:
        assert TorchDist(folder).tensors["weight"].shape == (6,) and unpickled


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_pickle_that_names_code_is_refused(tmp_path, module, name, protocol):
    """The shell, and everything that leads to it by dots, in both ways in which pickles name things."""
    canary = tmp_path / "ran"
    payload = call(module, name, f"touch {canary}", protocol)
    pickletools.dis(payload, out=io.StringIO())
    with pytest.raises(WeightsFolderError, match=r"\.metadata is (refused|damaged)") as refusal:
        read_metadata(checkpoint(tmp_path / "it", payload))
    assert "\n" not in str(refusal.value) and not canary.exists()
    if "." in name:
        assert f"it names {module}.{name}, which no checkpoint needs" in str(refusal.value)


def test_code_inside_of_proper_metadata_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return __import__("os").system, (f"touch {tmp_path}/ran",)

    with pytest.raises(WeightsFolderError, match=r"names (posix|os)\.system"):
        read_metadata(checkpoint(tmp_path / "it", pickle.dumps(dcp.Metadata({}, planner_data=Payload()))))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name", "attribute"),
    [
        ("pathlib", "PosixPath", "is_relative_to"),
        ("pathlib", "PosixPath", "mine"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex", "__eq__"),
        ("torch.distributed.checkpoint.metadata", "Metadata", "__setattr__"),
        ("torch.serialization", "_get_layout", "__defaults__"),
    ],
)
def test_a_pickle_that_changes_a_class_is_refused_and_undone(tmp_path, module, name, attribute):
    """A pickle sets the attributes of an object, and a class is one: every path could then be inside every folder."""
    word = b"X" + len(attribute).to_bytes(4, "little") + attribute.encode()
    payload = b"\x80\x04" + f"c{module}\n{name}\n".encode() + b"(N}" + word + b"cmegatron.x\nY\nstb."
    pickletools.dis(payload, out=io.StringIO())
    before = dict(vars(Path)), dict(vars(type(tmp_path))), dict(vars(dcp.MetadataIndex)), dict(vars(dcp.Metadata))
    with pytest.raises(WeightsFolderError, match=r"\.metadata is (refused: it names .* to change it|damaged)"):
        read_metadata(checkpoint(tmp_path / "it", payload))
    assert before == (
        dict(vars(Path)),
        dict(vars(type(tmp_path))),
        dict(vars(dcp.MetadataIndex)),
        dict(vars(dcp.Metadata)),
    )
    assert torch.serialization._get_layout.__defaults__ is None and not Path("/etc/passwd").is_relative_to(tmp_path)


def test_classes_of_other_writers_are_read_as_empty_objects(tmp_path):
    plan = torch.distributed.checkpoint.planner.SavePlan([])
    found = read_metadata(checkpoint(tmp_path, pickle.dumps(dcp.Metadata({}, planner_data=[plan], storage_data={}))))
    assert type(found.planner_data[0]).__name__ == "_Emptied"


def stored(**changes: object) -> dcp.Metadata:
    """Metadata of one tensor, with some facts replaced."""
    facts = {"file": "__0_0.distcp", "offset": 0, "length": 9, "key": "weight", "at": (0,), "size": (6,), "box": (6,)}
    facts |= changes
    tensor = dcp.TensorStorageMetadata(
        dcp.TensorProperties(torch.float32), facts["size"], [dcp.ChunkStorageMetadata((0,), facts["box"])]
    )
    index = dcp.MetadataIndex(facts["key"], facts["at"])
    return dcp.Metadata(
        {facts["key"]: tensor}, storage_data={index: _StorageInfo(facts["file"], facts["offset"], facts["length"])}
    )


def nested(depth: int) -> list[object]:
    """A list that is small in memory and endless as text."""
    found: list[object] = []
    for _ in range(depth):
        found = [found, found]
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "../../secret"}, "a file outside its folder: '../../secret'"),
        ({"file": "/dev/zero"}, "a file outside its folder: '/dev/zero'"),
        ({"file": 5}, "a file outside its folder: a int"),
        ({"file": "a\0b"}, "a file outside its folder"),
        ({"offset": -1}, "places 'weight' where nothing can be"),
        ({"length": "x"}, "places 'weight' where nothing can be"),
        ({"key": 7}, "where nothing can be"),
        ({"file": nested(60)}, "a file outside its folder: a list"),
        ({"size": (-6,)}, "describes no tensor under 'weight'"),
        ({"size": None}, "describes no tensor under 'weight'"),
        ({"box": (6, 6)}, "describes no tensor under 'weight'"),
    ],
)
def test_metadata_that_contradicts_its_format_is_refused(tmp_path, change, reason):
    with pytest.raises(WeightsFolderError) as refusal:
        read_metadata(checkpoint(tmp_path, pickle.dumps(stored(**change))))
    assert reason in str(refusal.value)


def test_older_checkpoints_are_read(tmp_path):
    older = Path(__file__).parents[2] / "fixtures" / "older_run" / "run" / "checkpoints" / "step_000002"
    assert "decoder.final_layernorm.weight" in read_metadata(older / "policy").state_dict_metadata
