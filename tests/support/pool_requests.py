"""What tests of the pool ask servers for, and what they accept as an answer."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

import torch
from faulty_proxy import FaultyProxy
from progress import wait_until
from tiny_models import EOS

from clipo_megatron.config.schema import PoolConfig
from clipo_megatron.flow import Prompt, RolloutGroup
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.servers.pool import ServerPool

PARAMS = SamplingParams(samples=3, max_new_tokens=8, stop_ids=(EOS,))
LONG = dataclasses.replace(PARAMS, samples=2, max_new_tokens=1000, stop_ids=())
QUICK = PoolConfig(
    concurrency=8, request_deadline_s=60, attempts=4, backoff_s=0.05, affinity_slack=2, join_deadline_s=30
)


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


def started(pool: ServerPool, requests: list[Request], params: SamplingParams, proxy: FaultyProxy):
    """Start a generation and wait until the server has all its requests and some tokens."""
    generation = pool.generate(requests, params, deadline_s=200)
    wait_until(lambda: proxy.in_flight >= len(requests), "all requests to be on the server")
    time.sleep(0.3)
    return generation
