"""Routing: a prompt keeps its server, unless that one is much busier than another."""

from __future__ import annotations

from collections import Counter

import pytest

from clipo_megatron.rollout.servers.routing import choose

SERVERS = [f"http://10.0.0.{host}:30000" for host in range(1, 9)]
IDLE = dict.fromkeys(SERVERS, 0)
PROMPTS = [f"gsm8k/{row}" for row in range(4000)]


def test_a_prompt_has_a_server_of_its_own_whatever_the_order():
    for prompt in PROMPTS[:50]:
        own = choose(prompt, IDLE, slack=4)
        assert choose(prompt, dict(reversed(IDLE.items())), slack=4) == own
        assert choose(prompt, IDLE, slack=0) == own


def test_prompts_spread_evenly():
    counts = Counter(choose(prompt, IDLE, slack=4) for prompt in PROMPTS)
    assert set(counts) == set(SERVERS)
    # 500 each are expected, with a standard deviation of 21
    assert all(abs(count - 500) < 110 for count in counts.values())


def test_most_prompts_keep_their_server_when_one_goes():
    gone = SERVERS[3]
    rest = {url: 0 for url in SERVERS if url != gone}
    for prompt in PROMPTS[:500]:
        before = choose(prompt, IDLE, slack=4)
        if before != gone:
            assert choose(prompt, rest, slack=4) == before


@pytest.mark.parametrize("slack", [0, 4])
def test_a_server_that_is_busier_than_the_slack_allows_is_left_for_the_idlest(slack):
    prompt = PROMPTS[0]
    own = choose(prompt, IDLE, slack=slack)
    assert choose(prompt, IDLE | {own: slack}, slack=slack) == own
    other = choose(prompt, IDLE | {own: slack + 1}, slack=slack)
    assert other != own
    idlest = next(url for url in SERVERS if url not in (own, other))
    busy = dict.fromkeys(SERVERS, slack + 5) | {idlest: 1, own: slack + 2}
    assert choose(prompt, busy, slack=slack) == idlest


def test_equally_idle_servers_are_chosen_by_preference_and_not_by_place():
    own = {prompt: choose(prompt, IDLE, slack=0) for prompt in PROMPTS[:200]}
    # The first server is everybody's, but busy: the others share what it cannot take.
    pushed = Counter(choose(prompt, IDLE | {url: 9}, slack=0) for prompt, url in own.items())
    assert len(pushed) == len(SERVERS)


def test_a_server_that_failed_the_request_is_asked_only_when_there_is_no_other():
    prompt = PROMPTS[0]
    order = []
    for _ in SERVERS:
        order.append(choose(prompt, IDLE, slack=4, excluded=set(order)))
    assert sorted(order) == sorted(SERVERS)
    assert choose(prompt, IDLE, slack=4, excluded=set(SERVERS)) == order[0]
    busy = dict.fromkeys(SERVERS, 50) | {order[0]: 0}
    assert choose(prompt, busy, slack=4, excluded={order[0]}) == order[1]


def test_a_single_server_is_always_chosen():
    assert choose("p", {"http://a": 99}, slack=0, excluded={"http://a"}) == "http://a"
