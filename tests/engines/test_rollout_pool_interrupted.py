"""Generations that are stopped, paused, detached or closed while a real SGLang server answers them."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from pool_requests import LONG, PARAMS, ask, check_answers, started
from progress import wait_until
from served import Served
from tiny_models import tiny_weights
from transformers import AutoTokenizer

from clipo_megatron.rollout.engine import EngineLostError, InFlight
from clipo_megatron.rollout.servers import dispatch


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
    generation, told = started(pool, ask(2), params, proxies[0]), []
    generation.detach(told.append)
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
    assert sorted(group.position for group in told) == [0, 1], "of these alone the caller is told at once"


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
