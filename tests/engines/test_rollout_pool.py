"""The pool against a real SGLang server behind faulty proxies: every request is answered once."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from faulty_proxy import FAULTS, LIES, FaultyProxy
from progress import wait_until
from safetensors.torch import load_file
from served import Served
from tiny_models import EOS, tiny_weights
from transformers import AutoTokenizer

from clipo_megatron.config.schema import DType, EngineKind, PoolConfig
from clipo_megatron.flow import Prompt, RolloutGroup
from clipo_megatron.rollout.engine import Cancelled, EngineError, EngineLostError, InFlight, Request, SamplingParams
from clipo_megatron.rollout.servers import dispatch
from clipo_megatron.rollout.servers.pool import ServerPool
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status

PARAMS = SamplingParams(samples=3, max_new_tokens=8, stop_ids=(EOS,))
LONG = dataclasses.replace(PARAMS, samples=2, max_new_tokens=1000, stop_ids=())
QUICK = PoolConfig(
    concurrency=8, request_deadline_s=60, attempts=4, backoff_s=0.05, affinity_slack=2, join_deadline_s=30
)


@pytest.fixture(scope="module")
def served(servers, tiny_model) -> Served:
    return servers.shared("sglang", tiny_model, DType.fp32)


@pytest.fixture(scope="module")
def weights(tiny_model) -> dict[str, torch.Tensor]:
    return load_file(tiny_model / "model.safetensors")


@pytest.fixture
def proxies(served) -> Iterator[list[FaultyProxy]]:
    pair = [FaultyProxy(served.url), FaultyProxy(served.url)]
    yield pair
    for proxy in pair:
        proxy.close()


@pytest.fixture
def make_pool(tiny_model, weights) -> Iterator[Callable[..., ServerPool]]:
    """Makes pools whose server has the model's weights as version 3, unless `admit=False`."""
    pools = []
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(*urls: str, config: PoolConfig = QUICK, version: int = 3, admit: bool = True, **options) -> ServerPool:
        options = {"model": tiny_model, "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True)} | options
        pools.append(ServerPool(EngineKind.sglang, config=config, endpoints=urls, **options))
        if admit:
            pools[-1].load_weights(weights.items(), version=version)
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def ask(count: int, *, tokens: int = 12, first: int = 0) -> list[Request]:
    return [
        Request(row, Prompt(f"math/{row}", (), torch.arange(3 + row % 50, 3 + row % 50 + tokens), "math", ""))
        for row in range(first, first + count)
    ]


def check_answers(requests: list[Request], groups: list[RolloutGroup], params: SamplingParams = PARAMS) -> None:
    """Check that every request was answered once, and completely."""
    assert Counter(group.position for group in groups) == Counter(request.position for request in requests)
    asked = {request.position: request.prompt.id for request in requests}
    for group in groups:
        assert group.prompt.id == asked[group.position]
        assert [rollout.sample for rollout in group.rollouts] == list(range(params.samples))
        for rollout in group.rollouts:
            count = rollout.tokens.numel()
            assert 1 <= count <= params.max_new_tokens
            assert rollout.tokens.shape == rollout.logprobs.shape == rollout.versions.shape
            assert rollout.logprobs.isfinite().all() and (rollout.logprobs <= 1e-4).all()
            assert rollout.finish == ("stop" if int(rollout.tokens[-1]) in params.stop_ids else "length")


# --- faults of one call ---


@pytest.mark.parametrize("fault", sorted(FAULTS))
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


# --- interrupting ---


def started(pool: ServerPool, requests: list[Request], params: SamplingParams, proxy: FaultyProxy):
    """Start a generation and wait until the server has all its requests and some tokens."""
    generation = pool.generate(requests, params, deadline_s=200)
    wait_until(lambda: proxy.in_flight >= len(requests), "all requests to be on the server")
    time.sleep(0.3)
    return generation


def test_stopped_rollouts_keep_their_tokens_and_go_on(proxies, make_pool, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pool = make_pool(proxies[0].url)
    requests = ask(2) + ask(1, tokens=100, first=2)  # long enough to be prefilled by a call of its own
    generation = started(pool, requests, LONG, proxies[0])
    partial = generation.stop()
    assert list(generation) == [] and generation.stop() == []
    assert sorted(group.position for group in partial) == [0, 1, 2]
    for group in partial:
        assert [rollout.sample for rollout in group.rollouts] == [0, 1]
        for rollout in group.rollouts:
            assert rollout.finish == "abort" and 1 <= rollout.tokens.numel() < 1000
            assert rollout.text == tokenizer.decode(rollout.tokens, skip_special_tokens=True)
    # One sample of the first is not there, one is complete: only the rest is generated.
    first = next(group for group in partial if group.position == 0)
    complete = dataclasses.replace(first.rollouts[0], finish="length")
    rest = {group.position: group.rollouts for group in partial if group is not first}
    again = [requests[0]._replace(begun=(complete,))]
    again += [requests[position]._replace(begun=tuple(rollouts)) for position, rollouts in sorted(rest.items())]
    most = max(rollout.tokens.numel() for group in partial for rollout in group.rollouts)
    params = dataclasses.replace(LONG, max_new_tokens=most + 5)
    groups = {group.position: group for group in pool.generate(again, params, deadline_s=100)}
    assert sorted(groups) == [0, 1, 2]
    assert groups[0].rollouts[0] is complete
    assert groups[0].rollouts[1].tokens.numel() == most + 5
    for position, rollouts in rest.items():
        for before, after in zip(rollouts, groups[position].rollouts, strict=True):
            count = before.tokens.numel()
            assert after.finish == "length" and after.tokens.numel() == most + 5 == after.versions.numel()
            assert after.tokens[:count].equal(before.tokens) and after.logprobs[:count].equal(before.logprobs)
            assert after.text == tokenizer.decode(after.tokens, skip_special_tokens=True)


def test_a_continuation_has_the_log_probs_of_the_whole_response(proxies, make_pool, tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    pool = make_pool(proxies[0].url)
    (group,) = started(pool, ask(1), LONG, proxies[0]).stop()
    most = max(rollout.tokens.numel() for rollout in group.rollouts)
    params = dataclasses.replace(LONG, max_new_tokens=most + 20)
    (group,) = pool.generate([ask(1)[0]._replace(begun=tuple(group.rollouts))], params, deadline_s=60)
    for rollout in group.rollouts:
        prompt = group.prompt.tokens
        with torch.no_grad():
            logits = model(torch.cat((prompt, rollout.tokens))[None]).logits[0, prompt.numel() - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, rollout.tokens[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=2e-4)


def test_closing_a_generation_frees_the_server_and_spares_other_pools(served, proxies, make_pool):
    mine, theirs = make_pool(proxies[0].url), make_pool(proxies[1].url)
    short = dataclasses.replace(LONG, max_new_tokens=300)
    other = started(theirs, ask(1, first=50), short, proxies[1])
    generation = started(mine, ask(2), LONG, proxies[0])
    generation.close()
    generation.close()
    assert list(generation) == []
    (group,) = other  # stopping one pool's requests leaves another's alone
    assert [rollout.tokens.numel() for rollout in group.rollouts] == [300, 300]
    wait_until(lambda: not running(served), "the server's requests to end")
    check_answers(ask(3), list(mine.generate(ask(3), PARAMS, deadline_s=60)))


def running(served: Served) -> int:
    """How many requests the server computes."""
    import json
    from urllib.request import urlopen

    with urlopen(f"{served.url}/v1/loads?include=core", timeout=10) as answer:
        return sum(each["num_running_reqs"] for each in json.load(answer)["loads"])


@pytest.mark.parametrize("in_flight", [InFlight.retract])
def test_detached_rollouts_cross_an_update_and_name_each_tokens_version(
    proxies, make_pool, tiny_model, in_flight, weights
):
    pool = make_pool(proxies[0].url)
    params = dataclasses.replace(LONG, max_new_tokens=400)
    generation = started(pool, ask(2), params, proxies[0])
    generation.detach()
    pool.pause(in_flight)
    pool.load_weights(tiny_weights(tiny_model, seed=9).items(), version=4)
    pool.resume()
    new = ask(3, first=10)
    groups = list(pool.generate(new, PARAMS, deadline_s=200))
    assert sorted(group.position for group in groups) == [0, 1, 10, 11, 12]
    for group in groups:
        for rollout in group.rollouts:
            assert (rollout.versions.diff() >= 0).all()
            expected = {3, 4} if group.position < 2 else {4}
            assert set(rollout.versions.tolist()) == expected
            if group.position < 2:
                assert rollout.tokens.numel() == 400 and rollout.version == 3
    assert list(generation) == []


def test_detached_rollouts_are_among_the_unanswered(proxies, make_pool, monkeypatch):
    monkeypatch.setattr(dispatch, "GRACE_S", 1.0)
    pool = make_pool(proxies[0].url)
    started(pool, ask(2), LONG, proxies[0]).detach()
    proxies[0].down()
    with pytest.raises(EngineLostError) as caught:
        list(pool.generate(ask(2, first=5), PARAMS, deadline_s=60))
    assert sorted(each.position for each in caught.value.unanswered) == [0, 1, 5, 6]


def test_requests_interrupted_by_others_are_asked_again(proxies, make_pool):
    pool = make_pool(proxies[0].url)
    params = dataclasses.replace(LONG, max_new_tokens=300)
    generation = started(pool, ask(2), params, proxies[0])
    pool.pause(InFlight.abort)
    timer = threading.Timer(1.0, pool.resume)
    timer.start()
    check_answers(ask(2), list(generation), params)
    timer.join()
    assert pool.take_statistics()["rollout/retries"] >= 2


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
