"""Checks of engines, servers, and what a step asks for."""

import pytest
from config_cases import assign, refusal

from clipo_megatron.checks.rollout import transport_of
from clipo_megatron.checks.run import check
from clipo_megatron.config.schema import (
    CorrectionKind,
    EngineKind,
    Transport,
    Unfinished,
)

SGLANG, VLLM = {"rollout__engine": EngineKind.sglang}, {"rollout__engine": EngineKind.vllm}
MASK = {"algorithm__correction__kind": CorrectionKind.mask}
HERE, ELSEWHERE = "http://127.0.0.1:30000", "http://node7:30000"
SOUND = [
    {},
    {**SGLANG, "rollout__endpoints": [HERE, "https://[::1]:9", "http://localhost:30001/"]},
    {**SGLANG, "rollout__sync__transport": Transport.ipc, "rollout__colocated": True},
    {**SGLANG, "rollout__sync__transport": Transport.disk, "rollout__colocated": True},
    {**SGLANG, "rollout__sync__transport": Transport.disk, "rollout__top_p": 0.9, "rollout__router": HERE},
    {**SGLANG, "rollout__over_sampling": 1.5, "rollout__unfinished": Unfinished.keep_running},
    {**SGLANG, "rollout__over_sampling": 1.5, "rollout__unfinished": Unfinished.resume, "rollout__colocated": True},
    {**VLLM, "rollout__over_sampling": 1.5, "rollout__max_refill_rounds": 4},
    {**VLLM, "rollout__over_sampling": 2.0, "rollout__unfinished": Unfinished.keep_running},
    {**SGLANG, "rollout__ahead": 1, "rollout__max_refill_rounds": 4},
    {**VLLM, "rollout__ahead": 1},
    {**SGLANG, "rollout__sync__delta": True},
    {**VLLM, "rollout__sync__delta": True},
    {**SGLANG, "rollout__ahead": 1, "rollout__unfinished": Unfinished.keep_running},
    {"rollout__ahead": 1},
    {"rollout__over_sampling": 2.0, "rollout__unfinished": Unfinished.resume},
    {**SGLANG, "rollout__ahead": 1, "rollout__unfinished": Unfinished.keep_running, "rollout__over_sampling": 2.0},
    {**VLLM, "rollout__top_p": 0.9, "rollout__top_k": 20},
    {"rollout__over_sampling": 2.0, "rollout__max_refill_rounds": 3},
    {**MASK, "algorithm__correction__floor": 0.5, "algorithm__correction__cap": 5.0},
    {"algorithm__correction__kind": CorrectionKind.truncate},
    {"serve__servers": 2, "serve__port": 65534},
]


@pytest.mark.parametrize("settings", SOUND)
def test_sound_ways_to_get_rollouts(config, settings, monkeypatch):
    monkeypatch.delenv("CLIPO_API_KEY", raising=False)
    check(assign(config, **settings), ranks=2)


@pytest.mark.parametrize(
    ("settings", "key", "part"),
    [
        ({"rollout__sync__transport": Transport.broadcast}, "rollout.sync.transport", "Set it to in_process"),
        ({**SGLANG, "rollout__sync__transport": Transport.in_process}, "rollout.sync.transport", "broadcast or disk"),
        ({**VLLM, "rollout__sync__transport": Transport.in_process}, "rollout.sync.transport", "Set it to disk"),
        ({**VLLM, "rollout__sync__transport": Transport.ipc}, "rollout.sync.transport", "rollout.colocated=true"),
        ({**SGLANG, "rollout__sync__transport": Transport.ipc}, "rollout.sync.transport", "rollout.colocated=true"),
        (
            {**SGLANG, "rollout__sync__transport": Transport.broadcast, "rollout__colocated": True},
            "rollout.sync.transport",
            "Set it to ipc",
        ),
        ({"rollout__colocated": True}, "rollout.colocated", "in the training processes"),
        ({"rollout__sync__delta": True}, "rollout.sync.delta", "Set it to false"),
        (
            {**SGLANG, "rollout__colocated": True, "rollout__over_sampling": 2.0}
            | {"rollout__unfinished": Unfinished.keep_running},
            "rollout.unfinished",
            "give their memory back",
        ),
        ({**SGLANG, "rollout__unfinished": Unfinished.resume}, "rollout.unfinished", "nothing is ever unfinished"),
        (
            {**SGLANG, "rollout__ahead": 1, "algorithm__correction__floor": 0.5},
            "algorithm.correction.floor",
            "truncated at the cap alone",
        ),
        ({**SGLANG, "rollout__ahead": 1, "rollout__colocated": True}, "rollout.ahead", "GPUs of their own"),
        (
            {**SGLANG, "rollout__ahead": 1, "rollout__unfinished": Unfinished.resume},
            "rollout.unfinished",
            "keep running while",
        ),
        ({**SGLANG, "rollout__ahead": 2, "rollout__over_sampling": 1.5}, "rollout.unfinished", "drops none"),
        (
            {**SGLANG, "rollout__ahead": 1, "rollout__over_sampling": 2.5}
            | {"rollout__unfinished": Unfinished.keep_running},
            "rollout.over_sampling",
            "at most 2 times",
        ),
        ({"rollout__ahead": -1}, "rollout.ahead", "from 0 to 64"),
        ({"rollout__over_sampling": 0.9}, "rollout.over_sampling", "at least 1"),
        ({"rollout__over_sampling": float("inf")}, "rollout.over_sampling", "1.2 to 2"),
        ({"rollout__max_refill_rounds": -1}, "rollout.max_refill_rounds", "at least 0"),
        (
            {"rollout__max_refill_rounds": 2, "rollout__samples_per_prompt": 1},
            "rollout.samples_per_prompt",
            "group of one",
        ),
        ({"rollout__endpoints": [HERE]}, "rollout.endpoints", "asks no server"),
        ({"rollout__router": HERE}, "rollout.router", "asks no server"),
        ({**SGLANG, "rollout__endpoints": ["node7:30000"]}, "rollout.endpoints[0]", "no http or https URL"),
        ({**SGLANG, "rollout__endpoints": [HERE, "http://:3"]}, "rollout.endpoints[1]", "no http or https URL"),
        ({**SGLANG, "rollout__endpoints": ["http://127.0.0.1:99999"]}, "rollout.endpoints[0]", "http://127.0.0.1"),
        ({**SGLANG, "rollout__endpoints": [HERE + "/v1"]}, "rollout.endpoints[0]", "without a path"),
        ({**SGLANG, "rollout__router": "localhost"}, "rollout.router", "no http or https URL"),
        ({**SGLANG, "rollout__endpoints": [HERE, HERE + "/"]}, "rollout.endpoints", "listed 2 times"),
        ({**SGLANG, "rollout__endpoints": [ELSEWHERE]}, "rollout.endpoints[0]", "CLIPO_API_KEY"),
        ({**SGLANG, "rollout__endpoints": [ELSEWHERE]}, "rollout.sync.host", "cannot reach the trainer"),
        ({**SGLANG, "rollout__router": "https://10.0.0.7:1"}, "rollout.router", "CLIPO_API_KEY"),
        ({**VLLM, "serve__host": "0.0.0.0", "rollout__api_key_env": "MY_KEY"}, "serve.host", "MY_KEY"),
        ({"rollout__top_k": 1025}, "rollout.top_k", "from 0 to 1024"),
        ({"rollout__deadline_s": 2700.0}, "layout.distributed_timeout_s", "rollout.deadline_s = 2700"),
        ({**SGLANG, "rollout__sync__deadline_s": 1900.0}, "layout.distributed_timeout_s", "900 + 1900 = 2800"),
        ({"rollout__pool__request_deadline_s": 0.0}, "rollout.pool.request_deadline_s", "above 0"),
        ({"rollout__pool__join_deadline_s": -1.0}, "rollout.pool.join_deadline_s", "above 0"),
        ({"rollout__pool__concurrency": 0}, "rollout.pool.concurrency", "from 1 to 100000"),
        ({"rollout__pool__attempts": 0}, "rollout.pool.attempts", "at least 1"),
        ({"rollout__pool__backoff_s": -0.1}, "rollout.pool.backoff_s", "at least 0"),
        ({"rollout__servers": 0}, "rollout.servers", "at least 1"),
        ({"rollout__sync__deadline_s": 0.0}, "rollout.sync.deadline_s", "above 0"),
        ({"rollout__sync__bucket_mb": 0}, "rollout.sync.bucket_mb", "at least 1"),
        ({"rollout__sync__verify_every": -1}, "rollout.sync.verify_every", "at least 0"),
        ({"serve__servers": 0}, "serve.servers", "at least 1"),
        ({"serve__tp": 0}, "serve.tp", "at least 1"),
        ({"serve__port": -1}, "serve.port", "65535"),
        ({"serve__port": 65534, "serve__servers": 3}, "serve.port", "65535"),
        ({"serve__max_restarts": -1}, "serve.max_restarts", "at least 0"),
        ({"serve__health_timeout_s": float("nan")}, "serve.health_timeout_s", "above 0"),
        ({"report__rollout_kl_alarm": 0.0}, "report.rollout_kl_alarm", "above 0"),
        ({**MASK, "algorithm__correction__cap": 0.5}, "algorithm.correction.cap", "from 1 to 100000000"),
        ({**MASK, "algorithm__correction__cap": float("nan")}, "algorithm.correction.cap", "from 1 to 100000000"),
        ({**MASK, "algorithm__correction__floor": -0.1}, "algorithm.correction.floor", "from 0 to 1"),
        ({**MASK, "algorithm__correction__floor": 1.5}, "algorithm.correction.floor", "from 0 to 1"),
        (
            {"algorithm__correction__kind": CorrectionKind.truncate, "algorithm__correction__floor": 0.5},
            "algorithm.correction.floor",
            "kind to mask",
        ),
    ],
)
def test_refused_ways_to_get_rollouts(config, settings, key, part, monkeypatch):
    for name in ("CLIPO_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)
    error = refusal(assign(config, **settings), 2)
    assert key in [problem.key for problem in error.problems], error
    assert part in str(error), error


def test_a_key_opens_other_machines_and_is_never_shown(config, monkeypatch):
    monkeypatch.setenv("CLIPO_API_KEY", "sesame-7")
    there = {**SGLANG, "rollout__endpoints": [ELSEWHERE], "rollout__sync__host": "10.0.0.1", "serve__host": "0.0.0.0"}
    check(assign(config, **there))
    error = refusal(assign(config, rollout__top_p=0.0, rollout__sync__host="127.0.0.1"))
    assert "sesame" not in str(error)
    assert {problem.key for problem in error.problems} == {"rollout.top_p", "rollout.sync.host"}
    monkeypatch.setenv("CLIPO_API_KEY", "")
    assert "is not set" in str(refusal(config))


def test_colocated_servers_open_memory_unless_another_transport_is_asked_for(config):
    """NCCL refuses two ranks on one GPU, so a broadcast cannot reach them."""
    colocated = assign(config, rollout__engine=EngineKind.sglang, rollout__colocated=True)
    assert transport_of(colocated) is Transport.ipc
    assert transport_of(assign(colocated, rollout__sync__transport=Transport.disk)) is Transport.disk
    assert transport_of(assign(config, rollout__colocated=False, rollout__sync__transport=None)) is Transport.broadcast


def test_default_transports(config):
    kinds = {engine: transport_of(assign(config, rollout__engine=engine)) for engine in EngineKind}
    assert {engine.value: transport.value for engine, transport in kinds.items()} == {
        "local": "in_process",
        "sglang": "broadcast",
        "vllm": "disk",
    }
