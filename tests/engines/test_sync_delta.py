"""Updates that send only what has changed: real servers end with the weights, by both transports."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from served import Served, Servers
from sync_steps import update_with_few_changes

from clipo_megatron.config.schema import DType


def greedy(server: Served) -> Any:
    """What a server answers greedily to a few tokens, log-probs included."""
    if server.engine == "sglang":
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        path, body = "/generate", {"input_ids": [5, 6, 7, 8], "sampling_params": sampling, "return_logprob": True}
    else:
        sampling = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        path, body = "/inference/v1/generate", {"token_ids": [5, 6, 7, 8], "sampling_params": sampling}
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.load(answer)
    if server.engine == "sglang":
        return found["meta_info"]["output_token_logprobs"]
    return [(row["token_id"], row["logprob"]) for row in found["choices"][0]["logprobs"]["content"]]


@pytest.mark.parametrize(
    ("engine", "transport"),
    [
        ("sglang", "broadcast"),
        pytest.param("sglang", "disk", marks=pytest.mark.full),
        pytest.param("vllm", "broadcast", marks=pytest.mark.full),
        pytest.param("vllm", "disk", marks=pytest.mark.full),
    ],
)
def test_servers_make_the_weights_of_what_has_changed(
    engine: str, transport: str, ranks: RankPool, servers: Servers, tiny_model: Path, tmp_path: Path
):
    """The server's checksums are compared after every update. vLLM packs weights on a CPU, and has none of those; so
    both engines also answer as they do with the same weights sent whole, to the bit."""
    server = servers.shared(engine, tiny_model, DType.fp32, delta=True)
    answers = {}
    for delta in (True, False):
        settings = {"dtype": torch.float32, "delta": delta, "bucket_mb": 1 / 16}
        settings |= {"folder": str(tmp_path), "model": str(tiny_model)} if transport == "disk" else {}
        results = ranks.run(
            update_with_few_changes, 4, str(tiny_model), [server.url], 2, 2, settings, transport, engine
        )
        assert all(each == results[0] for each in results)
        for version, report in enumerate(results[0]):
            assert report.servers == (server.url,) and report.attempts == 1 and not report.left_out
            assert report.phases["verify"] > 0 and report.phases["pause"] >= report.phases["pausing"]
            assert not report.unverified or engine == "vllm"
            # Positions of 2 bytes and values of 4, for a hundredth of the values; the start of a run of values counts.
            few = delta and version in (1, 3)
            assert report.sent < 0.04 * report.nbytes if few else report.sent == report.nbytes
        answers[delta] = greedy(server)
    assert answers[True] == answers[False]
