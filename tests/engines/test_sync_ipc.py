"""Weight updates through memory that a server opens; on a CPU, shared memory stands in for GPU memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import RankPool
from served import Servers
from sync_steps import update_repeatedly

from clipo_megatron.config.schema import DType


@pytest.mark.full
def test_a_real_server_opens_the_trainers_memory(ranks: RankPool, servers: Servers, tiny_model: Path):
    server = servers.shared("sglang", tiny_model, DType.fp32)
    settings = {"dtype": torch.float32}
    results = ranks.run(update_repeatedly, 4, str(tiny_model), [server.url], 2, 2, 2, settings, "ipc")
    assert all(each == results[0] for each in results)
    for report in results[0]:
        assert report.servers == (server.url,) and report.attempts == 1
        assert not report.left_out and not report.unverified and report.phases["verify"] > 0
