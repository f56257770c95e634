"""Weights by way of a folder: what the ranks write is a model folder, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from sync_steps import write_and_compare
from tiny_models import tiny_qwen2, tiny_qwen3_moe


@pytest.mark.parametrize(
    ("family", "tp", "pp", "ep", "world", "senders"),
    [(tiny_qwen2, 2, 2, 1, 4, 2), (tiny_qwen3_moe, 1, 1, 2, 2, 2), (tiny_qwen3_moe, 1, 2, 2, 4, 4)],
    ids=["TP2 x PP2", "EP2", "EP2 x PP2"],
)
def test_the_folder_is_a_model_folder(family, tp, pp, ep, world, senders, ranks: RankPool, tmp_path: Path):
    model = family(tmp_path / "model", tied=False)
    users = [tmp_path / "weights" / name for name in ("v1", "v3.tmp", "v5", "notes")]
    for folder in users:
        folder.mkdir(parents=True)
    exported = ranks.run(write_and_compare, world, str(model), str(tmp_path / "weights"), tp, pp, ep)
    (folder,) = (tmp_path / "weights").glob("clipo-*/v*")
    assert all(folder.is_dir() for folder in users), "only what the run has written is removed"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert len({name[: len("model-0-0")] for name in files}) == senders
    assert {path.name for path in folder.glob("*.safetensors")} == set(files)
    expected = exported[0]
    assert set(index["weight_map"]) == set(expected) == set(load_file(model / "model.safetensors"))
    for name, tensor in expected.items():
        assert torch.equal(files[index["weight_map"][name]][name], tensor), name
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
