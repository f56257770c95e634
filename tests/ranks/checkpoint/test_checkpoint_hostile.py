"""Checkpoints with code in their files, and manifests that fit: resuming refuses them, and nothing of them runs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from policy_steps import configuration
from tiny_models import tiny_llama
from update_steps import VOCAB, actor_on

from clipo_megatron.checkpoint import CheckpointContents, Checkpoints
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig, LayoutConfig, RunConfig
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.runtime.durable_files import crc32
from clipo_megatron.weights.formats.metadata import read_metadata
from clipo_megatron.weights.formats.torch_dist_writer import torch_save_bytes


class Payload:
    """Touches a file when it is unpickled without restriction."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def spoil_metadata(policy: Path, canary: Path) -> None:
    name, word = "os.system", f"touch {canary}"
    parts = [b"X" + len(each).to_bytes(4, "little") + each.encode() for each in ("torch.serialization", name, word)]
    (policy / ".metadata").write_bytes(b"\x80\x04" + parts[0] + parts[1] + b"\x93" + parts[2] + b"\x85R.")


def spoil_common(policy: Path, canary: Path) -> None:
    (policy / "common.pt").write_bytes(torch_save_bytes({"updates": Payload(canary)}))


def spoil_object(policy: Path, canary: Path) -> None:
    """Put code in the place of the extra state of a layer, at the end of its file."""
    metadata = read_metadata(policy)
    info = next(info for index, info in metadata.storage_data.items() if index.offset is None)
    code = torch_save_bytes([Payload(canary)])
    file = policy / info.relative_path
    info.offset, info.length = file.stat().st_size, len(code)
    file.write_bytes(file.read_bytes() + code)
    (policy / ".metadata").write_bytes(pickle.dumps(metadata))


SPOILED = {
    spoil_metadata: "names torch.serialization.os.system, which no checkpoint needs",
    spoil_common: "common.pt is damaged, or holds more than tensors and plain values",
    spoil_object: "holds more than tensors and plain values",
}


def loaded_when_spoiled(config: RunConfig, folder: Path) -> list[tuple[str, str]]:
    """Save a checkpoint, spoil it in each way, and load it; returns the kind and text of each error."""
    actor = actor_on(config, LayoutConfig())
    contents = CheckpointContents(models={POLICY: TrainableCheckpointer(actor.trainable)})
    found = []
    for number, spoil in enumerate(SPOILED):
        checkpoints = Checkpoints(folder / str(number), contents, CheckpointConfig(asynchronous=False))
        checkpoint = checkpoints.save(1)
        assert checkpoints.load(checkpoint) == 1
        spoil(checkpoint / POLICY, folder / "ran")
        file = checkpoint / "manifest.json"
        manifest = json.loads(file.read_text())
        for name, entry in manifest["files"].items():
            entry |= {"bytes": (checkpoint / name).stat().st_size, "crc32": crc32(checkpoint / name)}
        file.write_text(json.dumps(manifest))
        assert checkpoints.latest() == checkpoint, "only its content is wrong"
        with pytest.raises(Exception) as refusal:
            checkpoints.load(checkpoint)
        found.append((type(refusal.value).__name__, str(refusal.value)))
    return found


def test_code_in_a_checkpoint_does_not_run_when_training_resumes(ranks, tmp_path):
    config = configuration(tiny_llama(tmp_path / "model", vocab=VOCAB))
    (found,) = ranks.run(loaded_when_spoiled, 1, config, tmp_path)
    assert not (tmp_path / "ran").exists()
    for (kind, message), expected in zip(found, SPOILED.values(), strict=True):
        assert kind == "WeightsFolderError" and expected in message and "\n" not in message
