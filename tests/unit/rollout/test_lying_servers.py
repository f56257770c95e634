"""Servers that lie: an answer costs a retry, and as much memory as what was asked for, and nothing else."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from lying_server import (
    EXPERTS,
    LENGTH,
    OTHERS,
    TOKEN,
    VERSION,
    VOCABULARY,
    LyingServer,
    Reply,
    at,
    bomb,
    endless,
    routes,
)
from server_lies import CHOICE, LIES, META, SGLANG, VLLM, VLLM_LIES

from clipo_megatron.config.schema import EngineKind, PoolConfig
from clipo_megatron.flow import Prompt
from clipo_megatron.rollout.engine import EngineError, Request, Routing, SamplingParams
from clipo_megatron.rollout.servers import http, membership
from clipo_megatron.rollout.servers.http import EventLoop
from clipo_megatron.rollout.servers.pool import ServerPool
from clipo_megatron.rollout.servers.response_checks import most_bytes
from clipo_megatron.rollout.servers.server import Fault, ServerError
from clipo_megatron.rollout.servers.sglang import SGLangServer
from clipo_megatron.rollout.servers.vllm import VLLMServer

PARAMS = SamplingParams(samples=2, max_new_tokens=LENGTH, stop_ids=(2,))


def request(row: int = 0) -> Request:
    return Request(row, Prompt(f"set/{row}", (), torch.arange(3, 9), "set", ""))


@pytest.fixture(scope="module")
def loop():
    found = EventLoop("test")
    yield found
    found.close()


@pytest.fixture(scope="module")
def liar():
    found = LyingServer()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def honest_again(liar, monkeypatch):
    monkeypatch.setattr(http, "_BODY_S", 0.3)
    liar.lies.clear()


def asked(loop, kind, url, *, params=PARAMS, call=None):
    """What a server of that kind answers to one request, or to another call."""

    async def ask():
        server = kind(url, decode=lambda ids: "", vocabulary=VOCABULARY)
        try:
            if call is not None:
                return await call(server)
            return await server.generate(request(), params, version=VERSION, name="n", deadline_s=20)
        finally:
            await server.close()

    return loop.run(ask(), deadline_s=30)


@pytest.mark.parametrize("kind", [SGLangServer, VLLMServer])
def test_an_honest_answer_is_taken(loop, liar, kind):
    rollouts = asked(loop, kind, liar.url)
    assert [each.tokens.tolist() for each in rollouts] == [[TOKEN] * LENGTH] * 2
    assert [each.versions.tolist() for each in rollouts] == [[VERSION] * LENGTH] * 2


@pytest.mark.parametrize(
    ("kind", "path", "lie"),
    [
        *(pytest.param(SGLangServer, SGLANG, lie, id=f"sglang: {name}") for name, lie in LIES.items()),
        *(pytest.param(VLLMServer, VLLM, lie, id=f"vllm: {name}") for name, lie in VLLM_LIES.items()),
    ],
)
def test_a_lie_is_a_fault_of_the_server(loop, liar, kind, path, lie):
    liar.lies[path] = lie
    newer = lie is LIES["a newer version"]  # which the pool judges: a request may go on across an update
    if newer:
        assert max(int(each.versions[-1]) for each in asked(loop, kind, liar.url)) == VERSION + 1
        return
    with pytest.raises(ServerError) as caught:
        asked(loop, kind, liar.url)
    assert caught.value.fault in (Fault.garbage, Fault.stale, Fault.status, Fault.refused, Fault.deadline)
    assert len(str(caught.value)) < 1000


TRUNCATED = replace(PARAMS, top_p=0.9, top_k=3)
MASK, TOP = (META, "output_token_sampling_mask"), (*CHOICE, "logprobs", "content", 0, "top_logprobs")
SUPPORT_LIES: dict[str, Any] = {
    "no masks": at(*MASK, becomes=None),
    "one mask less": at(*MASK, by=lambda masks: masks[1:]),
    "a mask without the token": at(*MASK, 0, becomes=list(OTHERS)),
    "an empty mask": at(*MASK, 0, becomes=[]),
    "a mask with a token twice": at(*MASK, 0, becomes=[TOKEN, 8, 8]),
    "a mask with a negative id": at(*MASK, 0, becomes=[TOKEN, -1]),
    "a mask of more tokens than top_k and ties admit": at(*MASK, 0, becomes=list(range(TOKEN, TOKEN + 8))),
    "a mask that is text": at(*MASK, 0, becomes="789"),
    "a mask of floats": at(*MASK, 0, becomes=[7.0]),
    "no log-probs over the masks": at(META, "output_token_sampling_logprobs", becomes=None),
}
VLLM_SUPPORT_LIES: dict[str, Any] = {
    "tokens that lack a quarter of the probability": at(*TOP, 1, "logprob", becomes=-9999.0),
    "tokens without the drawn one": at(*TOP, becomes=[{"token_id": 8, "logprob": -0.0001}]),
    "a token that is text": at(*TOP, 0, "token_id", becomes="7"),
    "tokens without log-probs": at(*TOP, becomes=[{"token_id": 7}]),
    "no likeliest tokens": at(*TOP, becomes=None),
}


@pytest.mark.parametrize("kind", [SGLangServer, VLLMServer])
def test_honest_supports_are_taken(loop, liar, kind):
    for rollout in asked(loop, kind, liar.url, params=TRUNCATED):
        assert rollout.support.dtype == torch.int32
        assert rollout.support.sort(-1).values.tolist() == [[TOKEN, *OTHERS]] * LENGTH
        assert rollout.logprobs.tolist() == [-0.25 if kind is SGLangServer else -0.5] * LENGTH
    assert all(each.support is None for each in asked(loop, kind, liar.url))


@pytest.mark.parametrize(
    ("kind", "path", "lie"),
    [
        *(pytest.param(SGLangServer, SGLANG, lie, id=f"sglang: {name}") for name, lie in SUPPORT_LIES.items()),
        *(pytest.param(VLLMServer, VLLM, lie, id=f"vllm: {name}") for name, lie in VLLM_SUPPORT_LIES.items()),
    ],
)
def test_a_lie_about_supports_is_a_fault_of_the_server(loop, liar, kind, path, lie):
    liar.lies[path] = lie
    with pytest.raises(ServerError) as caught:
        asked(loop, kind, liar.url, params=TRUNCATED)
    assert caught.value.fault is Fault.garbage


def test_a_vllm_that_names_too_few_tokens_is_told_how_to_start(loop, liar):
    said = b'{"error": {"message": "Requested sample logprobs of 6, which is greater than max allowed: 5"}}'
    liar.lies[VLLM] = lambda answer: Reply([said], 400)
    with pytest.raises(ServerError, match="start it with --max-logprobs 6") as caught:
        asked(loop, VLLMServer, liar.url, params=TRUNCATED)
    assert caught.value.fault is Fault.unsupported


ROUTED = replace(PARAMS, routing=Routing(layers=2, per_token=2, experts=EXPERTS))
EXPERT = (META, "routed_experts")


def test_honest_routes_are_taken_and_go_on(loop, liar):
    for rollout in asked(loop, SGLangServer, liar.url, params=ROUTED):
        assert rollout.routes.dtype == torch.int16 and rollout.routes.shape == (6 + LENGTH - 1, 2, 2)
        assert (rollout.routes == EXPERTS - 1).all()


@pytest.mark.parametrize(
    "said",
    [None, "", "&&", 7, routes(6 + LENGTH, 0), routes(6 + LENGTH - 2, 0), routes(9, EXPERTS), routes(9, -1)],
    ids=["none", "nothing", "no base64", "a number", "a row more", "a row less", "a far expert", "a negative one"],
)
def test_a_lie_about_routes_is_a_fault_of_the_server(loop, liar, said):
    liar.lies[SGLANG] = at(*EXPERT, becomes=said)
    with pytest.raises(ServerError) as caught:
        asked(loop, SGLangServer, liar.url, params=ROUTED)
    assert caught.value.fault is Fault.garbage


CONTROL = {
    "a huge number of ranks": (SGLangServer, "/server_info", at("tp_size", becomes=10**30)),
    "no ranks": (SGLangServer, "/server_info", at("tp_size", becomes=0)),
    "ranks without end": (SGLangServer, "/server_info", at("tp_size", becomes=float("1e308") * 10)),
    "true ranks": (SGLangServer, "/server_info", at("tp_size", becomes=True)),
    "a list for an object": (SGLangServer, "/server_info", lambda answer: [answer]),
    "an endless state": (SGLangServer, "/model_info", endless(b" " * 65_536)),
    "a compressed state": (SGLangServer, "/model_info", bomb),
    "ranks of text": (VLLMServer, "/server_info", at("vllm_config", "parallel_config", becomes="1")),
    "no requests at once": (
        VLLMServer,
        "/server_info",
        at("vllm_config", "scheduler_config", "max_num_seqs", becomes=0),
    ),
    "versions in a list": (VLLMServer, "/version", lambda answer: [1]),
    "endless metrics": (VLLMServer, "/metrics", endless(b"x" * 65_536)),
}


@pytest.mark.parametrize(("kind", "path", "lie"), CONTROL.values(), ids=CONTROL)
def test_a_lie_about_itself_is_a_fault_of_the_server(loop, liar, kind, path, lie):
    state = lambda server: server.state(deadline_s=10)  # noqa: E731
    assert asked(loop, kind, liar.url, call=state).version == VERSION
    liar.lies[path] = lie
    with pytest.raises(ServerError) as caught:
        asked(loop, kind, liar.url, call=state)
    assert caught.value.fault is Fault.garbage


@pytest.mark.parametrize(
    ("kind", "two_stages"),
    [
        (SGLangServer, at("pp_size", becomes=2)),
        (VLLMServer, at("vllm_config", "parallel_config", "pipeline_parallel_size", becomes=2)),
    ],
)
def test_pipeline_stages_are_not_taken_for_tensor_parallel_ranks(loop, liar, kind, two_stages):
    liar.lies["/server_info"] = two_stages
    state = asked(loop, kind, liar.url, call=lambda server: server.state(deadline_s=10))
    assert (state.tp, state.pp) == (1, 2)


@pytest.mark.parametrize(
    "lie",
    [
        at("ranks", becomes=[]),
        at("ranks", 0, "checksums", becomes={}),
        at("ranks", 0, "checksums", becomes=["w"]),
        at("ranks", 0, "parallelism_info", "tp_rank", becomes=1),
        at("ranks", 0, "parallelism_info", "tp_rank", becomes=10**30),
        at("ranks", 0, "parallelism_info", becomes=[]),
    ],
)
def test_a_lie_about_checksums_is_a_fault_of_the_server(loop, liar, lie):
    liar.lies["/weights_checker"] = lie
    with pytest.raises(ServerError) as caught:
        asked(loop, SGLangServer, liar.url, call=lambda server: server.checksums(deadline_s=10))
    assert caught.value.fault is Fault.garbage


def test_many_endless_answers_take_no_more_memory_than_was_asked_for(loop, liar, monkeypatch):
    monkeypatch.setattr(http, "_BODY_S", 60.0)  # so that it is their size that ends them
    calls, params = 64, SamplingParams(samples=2, max_new_tokens=768)
    liar.lies[SGLANG] = endless(b" " * 65_536)
    limit = most_bytes(samples=2, prompt=6, tokens=768)

    async def ask_often(server):
        found = [
            server.generate(request(row), params, version=VERSION, name=str(row), deadline_s=60) for row in range(calls)
        ]
        return await asyncio.gather(*found, return_exceptions=True)

    tracemalloc.start()
    try:
        results = asked(loop, SGLangServer, liar.url, call=ask_often)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(isinstance(each, ServerError) and f"more than {limit} bytes" in str(each) for each in results)
    assert peak < 2 * calls * limit


@pytest.mark.parametrize("kind", [EngineKind.sglang, EngineKind.vllm])
def test_what_a_liar_is_asked_for_another_server_answers(liar, tmp_path, kind):
    path = SGLANG if kind is EngineKind.sglang else VLLM
    honest = LyingServer()
    liar.lies[path] = LIES["a far id"] if kind is EngineKind.sglang else VLLM_LIES["an id beyond the vocabulary"]
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {VOCABULARY}}}')
    config = PoolConfig(concurrency=8, attempts=4, backoff_s=0.01, affinity_slack=8)
    pool = ServerPool(kind, decode=lambda ids: "", config=config, endpoints=[liar.url, honest.url], model=tmp_path)
    try:
        pool.admit([liar.url, honest.url], VERSION)
        groups = list(pool.generate([request(row) for row in range(16)], PARAMS, deadline_s=60))
        counts = pool.take_statistics()
    finally:
        pool.close()
        honest.close()
    assert sorted(group.position for group in groups) == list(range(16))
    assert all(each.tokens.tolist() == [TOKEN] * LENGTH for group in groups for each in group.rollouts)
    assert liar.asked[path] and counts["rollout/fault_garbage"] == counts["rollout/retries"] > 0


def test_a_server_that_only_lies_is_asked_no_more_until_it_has_new_weights(liar, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(membership, "_FIRST_PROBE_AFTER_S", 0.01)
    honest = LyingServer()
    liar.lies[SGLANG] = LIES["a far id"]
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {VOCABULARY}}}')
    config = PoolConfig(concurrency=1, attempts=4, backoff_s=0.05, affinity_slack=8)
    urls = [liar.url, honest.url]
    pool = ServerPool(EngineKind.sglang, decode=lambda ids: "", config=config, endpoints=urls, model=tmp_path)

    def ask(rows: int) -> int:
        """How often the liar was asked while this many prompts were answered."""
        before = liar.asked.get(SGLANG, 0)
        groups = list(pool.generate([request(row) for row in range(rows)], PARAMS, deadline_s=60))
        assert len(groups) == rows
        return liar.asked.get(SGLANG, 0) - before

    def ask_until_dropped() -> int:
        asked_for = 0
        for _ in range(500):
            if liar.url in dropped():
                break
            asked_for += ask(8)
        return asked_for

    def dropped() -> list[str]:
        return [member.url for member in pool._members.all() if member.version < 0]

    try:
        pool.admit(urls, VERSION)
        assert ask_until_dropped() == membership.MOST_LIES and ask(40) == 0
        assert pool.usable() == [honest.url]
        named = [each.getMessage() for each in caplog.records if liar.url in each.getMessage()]
        assert len(named) == 1 and "token id" in named[0] and "asked no more" in named[0]
        pool.admit(urls, VERSION)
        assert ask(40) == 1  # a liar that lies again after new weights
        pool.admit(urls, VERSION)
        liar.lies.clear()
        assert ask(40) > membership.MOST_LIES
        liar.lies[SGLANG] = LIES["a far id"]
        assert ask_until_dropped() == membership.MOST_LIES
        honest.lies[SGLANG] = LIES["a far id"]
        with pytest.raises(EngineError, match=r"has no answer after|No rollout server is left"):
            ask(40)
    finally:
        pool.close()
        honest.close()
