"""The pool against a real SGLang server behind faulty proxies: every request is answered once."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

import pytest
import torch
from faulty_proxy import FAULTS, LIES
from pool_requests import LONG, PARAMS, QUICK, ask, check_answers, started
from progress import wait_until

from clipo_megatron.flow import Prompt
from clipo_megatron.rollout.engine import Cancelled, EngineError, EngineLostError, Request
from clipo_megatron.rollout.servers import dispatch
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status

# --- faults of one call ---


# Lies in an answer's content: tests/unit/rollout/test_lying_servers.py has servers that tell them, and the storm below.
IN_UNIT_TESTS = LIES.keys() - {"one sample less", "other ids"}


@pytest.mark.parametrize("fault", sorted(FAULTS - IN_UNIT_TESTS))
def test_a_fault_of_one_call_costs_no_answer(fault, proxies, make_pool):
    patience = 15.0 if fault == "stall" else 60.0  # what comes late on a busy machine is no fault
    pool = make_pool(*(proxy.url for proxy in proxies), config=dataclasses.replace(QUICK, request_deadline_s=patience))
    for proxy in proxies:
        proxy.plan(["", fault])
    requests = ask(8)
    begun = time.monotonic()
    check_answers(requests, list(pool.generate(requests, PARAMS, deadline_s=120)))
    assert time.monotonic() - begun < 60
    happened = sum(proxy.happened[fault] for proxy in proxies)
    assert happened >= 1
    statistics = pool.take_statistics()
    assert statistics["rollout/retries"] == (0 if fault == "delay" else happened)
    assert statistics["rollout/requests"] == 8 + statistics["rollout/retries"]


def test_cancelled_generation_ends_within_seconds(proxies, make_pool):
    pool = make_pool(*(proxy.url for proxy in proxies))
    for proxy in proxies:
        proxy.plan(["stall"])
    wanted = threading.Event()
    generation = pool.generate(ask(2), PARAMS, deadline_s=100, should_cancel=wanted.is_set)
    begun = time.monotonic()
    threading.Timer(1.0, wanted.set).start()
    with pytest.raises(Cancelled):
        list(generation)
    assert time.monotonic() - begun >= 1.0
    assert list(generation) == [], "something of it was handed on afterwards"
    check_answers(ask(2), list(pool.generate(ask(2), PARAMS, deadline_s=100)))


@pytest.mark.full
def test_a_storm_of_faults_costs_no_answer(proxies, make_pool):
    generator = torch.Generator().manual_seed(11)
    kinds = sorted(FAULTS - {"stall", "delay"})
    pool = make_pool(*(proxy.url for proxy in proxies), config=dataclasses.replace(QUICK, attempts=12))
    for proxy in proxies:
        drawn = torch.randint(0, 3 * len(kinds), (60,), generator=generator).tolist()
        proxy.plan([kinds[each] if each < len(kinds) else "" for each in drawn])
    requests = ask(60)
    check_answers(requests, list(pool.generate(requests, PARAMS, deadline_s=200)))
    assert sum(sum(proxy.happened.values()) for proxy in proxies) >= 10


@pytest.mark.parametrize("fault", ["error 500", "garbage", "one sample less", "stale"])
def test_what_no_server_can_answer_is_an_error_that_says_why(fault, proxies, make_pool):
    pool = make_pool(*(proxy.url for proxy in proxies))
    for proxy in proxies:
        proxy.always(fault)
    with pytest.raises(EngineError) as caught:
        list(pool.generate(ask(2), PARAMS, deadline_s=60))
    message = str(caught.value)
    assert "math/0" in message and "math/1" in message
    assert any(proxy.url in message for proxy in proxies)
    words = {"error 500": "planted trouble", "garbage": "not HTTP", "one sample less": "2 samples", "stale": "version"}
    assert words[fault] in message


# --- servers that go and come back ---


def test_a_server_that_refuses_is_left_out_until_it_is_back(proxies, make_pool):
    pool = make_pool(*(proxy.url for proxy in proxies))
    proxies[0].down()
    requests = ask(10)
    check_answers(requests, list(pool.generate(requests, PARAMS, deadline_s=60)))
    assert pool.usable() == [proxies[1].url]
    pool.health()
    before = proxies[0].calls
    proxies[0].up()
    wait_until(lambda: len(pool.usable()) == 2, "a server that is well again to be used")
    requests = ask(10, first=10)
    check_answers(requests, list(pool.generate(requests, PARAMS, deadline_s=60)))
    assert proxies[0].calls > before


def test_without_any_server_generation_is_lost_and_can_be_asked_again(proxies, make_pool, monkeypatch, weights):
    monkeypatch.setattr(dispatch, "GRACE_S", 2.0)
    pool = make_pool(*(proxy.url for proxy in proxies), config=dataclasses.replace(QUICK, concurrency=2, attempts=20))
    requests, groups = ask(30), []
    with pytest.raises(EngineLostError, match="No rollout server is left") as caught:
        for group in pool.generate(requests, PARAMS, deadline_s=100):
            groups.append(group)
            if len(groups) == 3:
                for proxy in proxies:
                    proxy.down()
    unanswered = list(caught.value.unanswered)
    assert unanswered and len(groups) >= 3
    assert sorted(each.position for each in (*groups, *unanswered)) == list(range(30))
    with pytest.raises(EngineError, match="No rollout server with weights can generate"):
        pool.health()
    for proxy in proxies:
        proxy.up()
    pool.load_weights(weights.items(), version=4)
    again = list(pool.generate(unanswered, PARAMS, deadline_s=60))
    check_answers(requests, groups + again)
    assert {int(version) for group in again for rollout in group.rollouts for version in rollout.versions} == {4}


def test_servers_with_other_weights_get_no_prompts(served, proxies, make_pool, monkeypatch):
    monkeypatch.setattr(dispatch, "GRACE_S", 300.0)
    pool = make_pool(proxies[0].url)
    other = make_pool(served.url, version=5)  # another run updates the same server
    begun = time.monotonic()
    with pytest.raises(EngineLostError, match="its weights are version 5, not version 3") as caught:
        list(pool.generate(ask(3), PARAMS, deadline_s=600))
    assert len(caught.value.unanswered) == 3
    assert time.monotonic() - begun < 300, "waiting cannot help"
    check_answers(ask(3), list(other.generate(ask(3), PARAMS, deadline_s=60)))


def test_nothing_is_asked_before_servers_are_admitted(proxies, make_pool):
    pool = make_pool(proxies[0].url, admit=False)
    assert pool.version == -1
    with pytest.raises(EngineLostError):
        list(pool.generate(ask(2), PARAMS, deadline_s=30))
    live = pool.join(1, deadline_s=10)
    pool.admit([live[0].server.url], 77)  # although it does not have these weights
    with pytest.raises(EngineLostError, match="not version 77"):
        list(pool.generate(ask(2), PARAMS, deadline_s=30))
    assert proxies[0].calls == 0


# --- deadlines and bounds ---


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_the_deadline_is_kept_and_names_the_prompts(fault, proxies, make_pool):
    pool = make_pool(proxies[0].url, config=dataclasses.replace(QUICK, attempts=100, backoff_s=0.2))
    proxies[0].always(fault)
    requests = ask(11)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"deadline of 3 s.*math/0, .*and 3 more") as caught:
        list(pool.generate(requests, PARAMS, deadline_s=3))
    assert 3 <= time.monotonic() - begun < QUICK.request_deadline_s
    if fault == "cut":
        assert proxies[0].url in str(caught.value)
    proxies[0].always(None)
    wait_until(pool.usable, "the server to be used again")
    check_answers(requests, list(pool.generate(requests, PARAMS, deadline_s=60)))


def test_no_more_requests_are_in_flight_than_allowed(proxies, make_pool):
    proxies[0].delay_s = 0.3
    proxies[0].always("delay")
    pool = make_pool(proxies[0].url, config=dataclasses.replace(QUICK, concurrency=3))
    check_answers(ask(12), list(pool.generate(ask(12), PARAMS, deadline_s=100)))
    assert proxies[0].most_in_flight == 3


def test_idle_servers_take_what_a_busy_one_cannot(proxies, make_pool):
    for proxy in proxies:
        proxy.delay_s = 0.5
        proxy.always("delay")
    pool = make_pool(*(proxy.url for proxy in proxies), config=dataclasses.replace(QUICK, affinity_slack=0))
    check_answers(ask(16), list(pool.generate(ask(16), PARAMS, deadline_s=100)))
    assert [proxy.calls for proxy in proxies] == [8, 8]
    assert [proxy.most_in_flight for proxy in proxies] == [4, 4]


# --- what is refused, and what is never said ---


def test_a_prompt_that_would_kill_servers_is_refused(served, make_pool):
    pool = make_pool(served.url)
    for tokens in ([3, 259], [-1], []):
        bad = Request(0, Prompt("math/bad", (), torch.tensor(tokens, dtype=torch.int64), "math", ""))
        with pytest.raises(EngineError, match="math/bad"):
            pool.generate([bad], PARAMS, deadline_s=10)
    check_answers(ask(1), list(pool.generate(ask(1), PARAMS, deadline_s=60)))


def test_weights_that_do_not_fit_are_refused(served, make_pool, weights):
    pool = make_pool(served.url)
    wrong = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up" not in name}
    wrong |= {"model.extra": torch.zeros(2), "model.norm.weight": torch.zeros(3)}
    with pytest.raises(EngineError, match="3 problems") as caught:
        pool.load_weights(wrong.items(), version=9)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.extra", "model.norm.weight"):
        assert name in str(caught.value)
    assert pool.version == 3


def test_the_key_is_sent_and_never_shown(proxies, make_pool, monkeypatch, caplog):
    key = "very-secret-4711"
    monkeypatch.setenv("CLIPO_TEST_KEY", key)
    with caplog.at_level(logging.DEBUG):
        pool = make_pool(proxies[0].url, api_key_env="CLIPO_TEST_KEY")
        proxies[0].always("error 500")
        with pytest.raises(EngineError) as caught:
            list(pool.generate(ask(1), PARAMS, deadline_s=60))
    assert proxies[0].headers and all(each["Authorization"] == f"Bearer {key}" for each in proxies[0].headers)
    server = pool.discover()[0].server
    shown = [str(caught.value), repr(caught.value), repr(pool), repr(server), repr(server._http), caplog.text]
    assert not any(key in each for each in shown)
    monkeypatch.setenv("CLIPO_TEST_KEY", "with\nnewline")
    with pytest.raises(EngineError, match=r"\$CLIPO_TEST_KEY") as caught:
        make_pool(proxies[0].url, api_key_env="CLIPO_TEST_KEY", admit=False).discover()
    assert "newline" not in str(caught.value)


# --- finding servers ---


def test_servers_are_found_in_the_registry(served, make_pool, tmp_path):
    registry = Registry(tmp_path / "servers")
    record = ServerRecord("server-0", served.url, "sglang", 1, "here", 1, "b", Status.starting)
    pool = make_pool(registry=registry.folder, admit=False)
    registry.write(record)
    registry.write(dataclasses.replace(record, name="server-1", url="http://127.0.0.1:9", status=Status.ready))
    registry.write(dataclasses.replace(record, name="server-2", engine="vllm", status=Status.ready))
    with pytest.raises(EngineError, match=r"0 of 1 rollout servers answered within 1 s.*127\.0\.0\.1:9"):
        pool.join(1, deadline_s=1)
    ready = dataclasses.replace(record, status=Status.ready)
    threading.Timer(1.0, registry.write, [ready]).start()
    (live,) = pool.join(1, deadline_s=20)
    assert live.server.url == served.url and live.state.engine.startswith("SGLang 0.5") and live.state.tp == 1


def test_a_router_gets_the_prompts_and_servers_the_rest(served, proxies, make_pool):
    router, server = proxies
    pool = make_pool(server.url, router=router.url)
    router.plan(["stale", "cut", "", "error 500"])
    check_answers(ask(8), list(pool.generate(ask(8), PARAMS, deadline_s=100)))
    assert server.calls == 0 and router.calls > 8 * PARAMS.samples  # one call for each sample, and the retries
    generation = started(pool, ask(2), LONG, router)
    assert sorted(group.position for group in generation.stop()) == [0, 1]
    router.down()
    with pytest.raises(EngineError, match=router.url):
        list(pool.generate(ask(1), PARAMS, deadline_s=60))


def test_closing_twice_is_no_error_and_generating_afterwards_is(served, make_pool):
    pool = make_pool(served.url)
    pool.close()
    pool.close()
    with pytest.raises(EngineError, match="closed"):
        pool.generate(ask(1), PARAMS, deadline_s=5)


def test_every_lie_is_a_planted_fault():
    assert set(LIES) < FAULTS and len(FAULTS) >= 20
