"""A real SGLang server, proxies before it that misbehave, and pools of clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from faulty_proxy import FaultyProxy
from pool_requests import QUICK
from safetensors.torch import load_file
from served import Served
from transformers import AutoTokenizer

from clipo_megatron.config.schema import DType, EngineKind, PoolConfig
from clipo_megatron.rollout.servers.pool import ServerPool


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
