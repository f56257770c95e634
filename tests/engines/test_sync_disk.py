"""Weight updates through a folder: complete or absent, loaded by SGLang and vLLM, verified, and removed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import RankPool
from served import Servers
from sync_steps import update_repeatedly

from clipo_megatron.config.schema import DType


@pytest.mark.full
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_both_engines_load_the_folder(engine, ranks: RankPool, servers: Servers, tiny_model: Path, tmp_path: Path):
    server = servers.shared(engine, tiny_model, DType.fp32)
    folder = tmp_path / "weights"
    for name in ("v1", "v2", "v3.tmp", "notes"):
        (folder / name).mkdir(parents=True)  # the user's
    settings = {"folder": str(folder), "model": str(tiny_model), "dtype": torch.float32}
    results = ranks.run(update_repeatedly, 2, str(tiny_model), [server.url], 1, 2, 2, settings, "disk", engine)
    assert results[0] == results[1]
    for report in results[0]:
        assert report.servers == (server.url,) and not report.left_out
        if engine == "vllm":  # on a CPU it packs the weights of linear layers, so they cannot be compared
            packed = [name for name in report.unverified if "_proj.weight of" in name or "lm_head.weight of" in name]
            assert report.unverified == tuple(packed) and len(packed) <= 17
        else:
            assert not report.unverified
        assert report.phases["load"] > 0 and report.phases["verify"] > 0
    *users, own = sorted(folder.iterdir(), key=lambda path: path.name.startswith("clipo-"))
    assert {path.name for path in users} == {"v1", "v2", "v3.tmp", "notes"}
    assert [path.name for path in own.glob("v*")] == ["v1"]
