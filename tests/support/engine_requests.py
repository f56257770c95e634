"""Engines of every kind, requests to them, and what a plain forward says of the answers."""

from __future__ import annotations

from pathlib import Path

import torch
from served import Servers
from transformers import AutoTokenizer

from clipo_megatron.config.schema import DType, EngineKind, PoolConfig
from clipo_megatron.flow import Prompt, RolloutGroup
from clipo_megatron.rollout.engine import Engine, Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine
from clipo_megatron.rollout.servers.pool import ServerPool


def new_engine(kind: str, model: Path, servers: Servers) -> Engine:
    """An engine of this kind in fp32; servers are shared, so it may find other weights."""
    if kind == "local":
        return LocalEngine(model, dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return ServerPool(
        EngineKind(kind),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        config=PoolConfig(request_deadline_s=120, backoff_s=0.1, join_deadline_s=30),
        endpoints=[servers.shared(kind, model, DType.fp32).url],
        model=model,
    )


def ask(*lengths: int, first: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    return [
        Request(row, Prompt(f"math/{row}", (), torch.randint(3, 259, (length,), generator=generator), "math", ""))
        for row, length in enumerate(lengths, start=first)
    ]


def run(engine: Engine, requests: list[Request], params: SamplingParams) -> list[RolloutGroup]:
    groups = sorted(engine.generate(requests, params, deadline_s=120), key=lambda group: group.position)
    assert [group.position for group in groups] == [request.position for request in requests]
    return groups


def expected_logprobs(model, prompt: torch.Tensor, response: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs [R, V] by one plain forward."""
    with torch.no_grad():
        logits = model(torch.cat((prompt, response))[None]).logits[0, prompt.numel() - 1 : -1]
    return (logits / temperature).log_softmax(-1)
