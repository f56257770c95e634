"""Weight updates by broadcast into real SGLang servers: equal to the bit, from every layout, despite faults."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from faulty_proxy import FaultyProxy
from ranks import RankError, RankPool
from served import Served, Servers
from sync_steps import harm_in_the_middle, plant_a_wrong_byte, update_repeatedly
from tiny_models import tiny_llama, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

from clipo_megatron.config.schema import DType

DEADLINE_S = 24.0  # of one update, in tests where a fault uses up a part of it
ROOM = {"mem_fraction_static": 0.5}  # other processes take memory while a server starts
# Each stage of the shared server's model has several buckets of this size; the server pads its vocabulary.
SMALL: dict[str, Any] = {"bucket_mb": 1 / 16, "dtype": torch.float32}


@pytest.fixture
def server(servers: Servers, tiny_model: Path) -> Served:
    return servers.shared("sglang", tiny_model, DType.fp32)


@pytest.fixture(scope="session", params=[tiny_qwen2, tiny_qwen3])
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 has biases and an untied output layer, a Qwen3 norms of queries and keys."""
    return request.param(tmp_path_factory.mktemp("family") / "model", tied=False, vocab=515, head_dim=16)


def held(server: Served) -> dict[str, str]:
    """The server's own checksums."""
    request = urllib.request.Request(
        f"{server.url}/weights_checker", b'{"action": "checksum"}', {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["ranks"][0]["checksums"]


@pytest.mark.parametrize(
    "layout", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)], ids="tp{0[0]} pp{0[1]} dp{0[2]}".format
)
def test_every_update_arrives_to_the_bit(layout, ranks: RankPool, server: Served, tiny_model: Path):
    tp, pp, dp = layout
    results = ranks.run(update_repeatedly, tp * pp * dp, str(tiny_model), [server.url], tp, pp, 3, SMALL)
    assert all(each == results[0] for each in results), "ranks were told different things"
    for version, report in enumerate(results[0]):
        assert report.version == version and report.servers == (server.url,) and report.attempts == 1
        assert not report.left_out and not report.unverified and report.phases["verify"] > 0
        paused = sum(report.phases[name] for name in ("pausing", "begin", "buckets", "end", "verify", "resume"))
        assert paused <= report.phases["pause"] <= report.seconds, "from the call that pauses until all generate again"
    assert "join" in results[0][0].phases and "join" not in results[0][1].phases, "groups are formed once"


@pytest.mark.full
def test_what_other_families_have(ranks: RankPool, servers: Servers, family_model: Path):
    server = servers.shared("sglang", family_model, options=ROOM)
    before = held(server)
    (reports, _) = ranks.run(update_repeatedly, 2, str(family_model), [server.url], 1, 2, 2, {})
    assert not reports[-1].unverified
    after = held(server)
    biased = "model.layers.3.self_attn.qkv_proj.bias" in after
    assert biased != ("model.layers.3.self_attn.k_norm.weight" in after) and "lm_head.weight" in after
    assert [name for name in after if after[name] == before[name]] == [], "tensors that no update has changed"


@pytest.mark.full
def test_experts_arrive_from_the_ranks_that_hold_them(ranks: RankPool, servers: Servers, tmp_path: Path):
    """The trainer cannot verify the server's stacked experts, so their arrival shows in the server's own checksums."""
    model = tiny_qwen3_moe(tmp_path / "model", vocab=515, head_dim=16, expert_intermediate=32)
    server = servers.shared("sglang", model, options=ROOM)
    before = held(server)
    (reports, *_) = ranks.run(update_repeatedly, 4, str(model), [server.url], 1, 2, 2, {}, "broadcast", "sglang", 2)
    after = held(server)
    assert reports[-1].unverified and all(".experts." in line for line in reports[-1].unverified)
    assert [name for name in after if after[name] == before[name]] == [], "tensors that no update has changed"
    ranks.run(update_repeatedly, 4, str(model), [server.url], 1, 2, 1, {}, "broadcast", "sglang", 2, False)
    assert held(server) == before


def test_a_wrong_byte_is_found_and_named(ranks: RankPool, server: Served, tiny_model: Path):
    with pytest.raises(RankError) as raised:
        ranks.run(plant_a_wrong_byte, 2, str(tiny_model), [server.url], SMALL)
    report = str(raised.value)
    assert report.count("sync.checksums.ChecksumError") == 2, "both ranks stop"
    assert f"{server.url}, rank 0 of 1: model.layers.2.self_attn.o_proj.weight has checksum" in report


class OlderRelease(FaultyProxy):
    """An older release, which answers 404 to the calls that begin and end an update."""

    async def _pass_on(self, request: web.Request, sent: bytes) -> web.StreamResponse:
        answer = await super()._pass_on(request, sent)
        if request.path in ("/begin_weight_update", "/end_weight_update"):
            self.happened[request.path] += 1
            return web.json_response({"detail": "Not Found"}, status=404)
        return answer


def test_a_release_without_begin_and_end(ranks: RankPool, server: Served, tiny_model: Path):
    proxy = OlderRelease(server.url)
    try:
        (reports,) = ranks.run(update_repeatedly, 1, str(tiny_model), [proxy.url], 1, 1, 2, SMALL)
    finally:
        proxy.close()
    assert [report.attempts for report in reports] == [1, 1]
    assert proxy.happened == {"/begin_weight_update": 2, "/end_weight_update": 2}


class StillBusy(FaultyProxy):
    """A server that could not empty its cache after the last bucket, because requests were running."""

    async def _pass_on(self, request: web.Request, sent: bytes) -> web.StreamResponse:
        self.happened["flushed by a call"] += request.path == "/flush_cache"
        body = json.loads(sent) if request.path == "/update_weights_from_distributed" else {}
        if not body.get("flush_cache"):
            return await super()._pass_on(request, sent)
        await super()._pass_on(request, json.dumps(body | {"flush_cache": False}).encode())
        self.happened["not flushed"] += 1
        message = "Weights were updated, but the cache was not flushed because requests are still running or queued."
        return web.json_response({"success": False, "message": message}, status=400)


def test_a_cache_that_the_last_bucket_could_not_empty_is_emptied(ranks: RankPool, server: Served, tiny_model: Path):
    proxy = StillBusy(server.url)
    try:
        (reports,) = ranks.run(update_repeatedly, 1, str(tiny_model), [proxy.url], 1, 1, 2, SMALL)
    finally:
        proxy.close()
    assert [report.attempts for report in reports] == [1, 1], "the weights have arrived: nothing is sent again"
    assert proxy.happened == {"not flushed": 2, "flushed by a call": 2}


class RefusesOnce(FaultyProxy):
    """A server that once refuses a bucket, the second of the first update, or answers rubbish to it."""

    def __init__(self, target: str, *, rubbish: bool):
        super().__init__(target)
        self.buckets, self.rubbish = 0, rubbish

    async def _pass_on(self, request: web.Request, sent: bytes) -> web.StreamResponse:
        self.buckets += request.path == "/update_weights_from_distributed"
        if request.path == "/update_weights_from_distributed" and self.buckets == 2:
            if self.rubbish:
                return web.Response(body=b"<html>", content_type="application/json")
            return web.json_response({"success": False, "message": "planted refusal"}, status=400)
        return await super()._pass_on(request, sent)


@pytest.mark.parametrize("rubbish", [False, True], ids=["refusal", "rubbish"])
def test_a_refused_bucket_costs_one_attempt(rubbish, ranks: RankPool, server: Served, tiny_model: Path):
    proxy = RefusesOnce(server.url, rubbish=rubbish)
    try:
        settings = SMALL | {"deadline_s": DEADLINE_S}
        results = ranks.run(update_repeatedly, 2, str(tiny_model), [proxy.url], 1, 2, 2, settings)
    finally:
        proxy.close()
    assert [report.attempts for report in results[1]] == [2, 1]
    assert all(report.servers == (proxy.url,) and not report.left_out for report in results[0])


@pytest.fixture(scope="module")
def pair(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    """Two servers that may be harmed, of a model with several buckets; both run again after each test."""
    model = tiny_llama(tmp_path_factory.mktemp("pair"), hidden=256, head_dim=64, intermediate=704, vocab=1003)
    both = [servers.own("sglang", model, options=ROOM).begin() for _ in range(2)]
    for each in both:
        each.wait()
    yield both
    for each in both:
        each.stop()


@pytest.mark.full
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_server_lost_in_the_middle_of_an_update(fault, ranks: RankPool, pair: list[Served], tmp_path: Path):
    staying, lost = pair
    marker = tmp_path / "first update is over"
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(
            ranks.run, harm_in_the_middle, 2, str(staying.model), [staying.url, lost.url], fault, lost.process.pid,
            str(marker), DEADLINE_S,
        )  # fmt: skip
        while not marker.exists() and not work.done():
            time.sleep(0.1)
        if fault == "kill":
            lost.kill()
            lost.begin().wait()
        else:
            lost.resume()
        (seconds, first, second), (_, _, other) = work.result()
    assert first.servers == (staying.url,) and list(first.left_out) == [lost.url] and first.attempts == 2
    assert lost.url in first.left_out[lost.url] and first.left_out[lost.url].startswith("buckets: ")
    # a killed server's connections break; of a stopped one only the silence shows
    assert seconds < (DEADLINE_S / 4 if fault == "kill" else DEADLINE_S)
    assert set(second.servers) == {staying.url, lost.url} and not second.left_out, "it is back"
    assert other == second
