"""Weight updates through memory that a server opens; on a CPU, shared memory stands in for GPU memory."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from ranks import RankPool
from served import Served, Servers
from sync_steps import update_repeatedly

from clipo_megatron.config.schema import DType


def asked(server: Served, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def greedy(server: Served) -> list[float]:
    """The log-probs of a greedy continuation by a vLLM server."""
    model = asked(server, "/v1/models")["data"][0]["id"]
    body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "logprobs": 0}
    return asked(server, "/v1/completions", body | {"ignore_eos": True})["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.full
@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_vllm_takes_buckets_and_generates_with_them(transport, ranks: RankPool, servers: Servers, tiny_model: Path):
    """On a CPU it packs the weights of linear layers, so that checksums compare the others; what it says shows all."""
    server = servers.shared("vllm", tiny_model)
    layout = (1, 2) if transport == "broadcast" else (2, 1)  # two senders, or one bucket gathered from two ranks

    def update(updates: int, changing: bool) -> list[float]:
        (reports, _) = ranks.run(
            update_repeatedly, 2, str(tiny_model), [server.url], *layout, updates, {}, transport, "vllm", 1, changing
        )
        for report in reports:
            assert report.servers == (server.url,) and report.attempts == 1 and not report.left_out
            assert all("_proj.weight of" in line or "lm_head.weight of" in line for line in report.unverified)
        return greedy(server)

    before = update(1, changing=False)
    changed = update(2, changing=True)
    assert max(abs(one - other) for one, other in zip(before, changed, strict=True)) > 1e-3
    assert update(1, changing=False) == before


@pytest.mark.full
def test_a_real_server_opens_the_trainers_memory(ranks: RankPool, servers: Servers, tiny_model: Path):
    server = servers.shared("sglang", tiny_model, DType.fp32)
    settings = {"dtype": torch.float32}
    results = ranks.run(update_repeatedly, 4, str(tiny_model), [server.url], 2, 2, 2, settings, "ipc")
    assert all(each == results[0] for each in results)
    for report in results[0]:
        assert report.servers == (server.url,) and report.attempts == 1
        assert not report.left_out and not report.unverified and report.phases["verify"] > 0
