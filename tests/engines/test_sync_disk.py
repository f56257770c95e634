"""Weights by way of a folder: whole or not there, read by SGLang and vLLM, proven, and cleaned up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from served import Servers
from sync_steps import push_often, write_and_compare
from tiny_models import tiny_qwen2, tiny_qwen3_moe


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_both_engines_read_it(engine, ranks: RankPool, servers: Servers, tiny_model: Path, tmp_path: Path):
    server = servers.shared(engine, tiny_model, options={"mem_fraction_static": 0.5} if engine == "sglang" else None)
    folder = tmp_path / "weights"
    (folder / "v7.tmp").mkdir(parents=True)  # of a run that was killed
    (folder / "v7.tmp" / "model-stage0-00000.safetensors").write_bytes(b"half")
    (folder / "v3").mkdir()
    (folder / "notes").mkdir()  # nobody else's business
    settings = {"folder": str(folder), "model": str(tiny_model)}
    results = ranks.run(push_often, 2, str(tiny_model), [server.url], 1, 2, 2, settings, "disk", engine)
    assert results[0] == results[1]
    for report in results[0]:
        assert report.servers == (server.url,) and not report.left_out
        if engine == "vllm":  # on a CPU it packs the matrices of linear layers, and keeps nothing to look at
            packed = [name for name in report.unproven if "_proj.weight of" in name or "lm_head.weight of" in name]
            assert report.unproven == tuple(packed) and len(packed) <= 17
        else:
            assert not report.unproven
        assert report.phases["load"] > 0 and report.phases["verify"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "v1"]


@pytest.mark.parametrize(
    ("family", "tp", "pp", "ep", "world", "senders"),
    [(tiny_qwen2, 2, 2, 1, 4, 2), (tiny_qwen3_moe, 1, 1, 2, 2, 2), (tiny_qwen3_moe, 1, 2, 2, 4, 4)],
    ids=["TP2 x PP2", "EP2", "EP2 x PP2"],
)
def test_the_folder_is_a_model_folder(family, tp, pp, ep, world, senders, ranks: RankPool, tmp_path: Path):
    model = family(tmp_path / "model", tied=False)
    exported = ranks.run(write_and_compare, world, str(model), str(tmp_path / "weights"), tp, pp, ep)
    (folder,) = (tmp_path / "weights").iterdir()
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
