"""The speed of the attention that training uses, over rows whose lengths were never seen before."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipo_megatron.config.schema import DType, ModelConfig
from clipo_megatron.flow import Segment
from clipo_megatron.policy.batch.packing import pack
from clipo_megatron.policy.batch.random_rollouts import random_rollouts
from clipo_megatron.policy.model.attention import PackedAttention, plan_attention
from clipo_megatron.policy.model.model import TORCH_DTYPE, transformer_config
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.models import SIZES
from clipo_megatron.training.proving.outcome import Outcome, Task, seconds_of, seconds_once
from clipo_megatron.weights.families import model_spec

DRAWS = 20
LEAST_FLOPS = 300e12  # of the forward, on a GPU
MOST_UNEVEN = 2.0  # the slowest row against the median, by FLOP/s


def attention_of(
    segments: Sequence[Segment], layout: Layout, *, heads: int, kv_heads: int, size: int
) -> Callable[[], Tensor]:
    """A function that computes a row's attention on random queries, keys and values; the row is planned here."""
    dtype = DType.bf16 if platform().has_gpu else DType.fp32
    facts = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * size}
    config = transformer_config(model_spec(SIZES["tiny"] | facts), ModelConfig(dtype=dtype), layout)
    attention = PackedAttention(config, layer_number=1)
    plan = plan_attention(segments, platform().device)
    tokens = sum(each.length for each in segments)
    query, key, value = (
        torch.randn(tokens, 1, count, size, device=platform().device, dtype=TORCH_DTYPE[dtype])
        for count in (heads, kv_heads, kv_heads)
    )
    return lambda: attention(query, key, value, packed_seq_params=plan)


def flops_of(segments: Sequence[Segment], *, heads: int, size: int) -> float:
    """FLOPs of the forward: two products over the pairs of query and key that attend."""
    pairs = sum(each.length * (each.length + 1) / 2 + each.length * each.context_length for each in segments)
    return 4.0 * heads * size * pairs


def measure(task: Task) -> Outcome:
    """The rate over fresh draws of lengths, and how even it is, the first call of each row included."""
    outcome = Outcome()
    heads, kv_heads, size = task.pick((4, 2, 32), (8, 2, 64), (28, 4, 128))
    groups, prompt, response = task.pick((1, 32, 32), (2, 128, 128), (2, 512, 512))
    rates = []
    for draw in range(task.pick(3, DRAWS, DRAWS) + 1):
        _, samples = random_rollouts(100, groups=groups, samples=8, prompt=prompt, response=response, seed=draw)
        segments = pack(samples, share_prompts=True).segments
        seconds = seconds_once(attention_of(segments, task.layout, heads=heads, kv_heads=kv_heads, size=size))
        rates.append(flops_of(segments, heads=heads, size=size) / seconds)
    rates, median = rates[1:], statistics.median(rates[1:])  # the first warms up
    if platform().has_gpu:
        outcome.at_least("attention with shared prompts, forward", median / 1e12, LEAST_FLOPS / 1e12, unit="TFLOP/s")
    else:
        outcome.at_least(
            "attention with shared prompts, share of a product's rate", median / _rate(), task.pick(1e-4, 0.02, None)
        )
    name = f"slowest of {len(rates)} fresh rows against the median"
    outcome.at_most(name, median / min(rates), task.pick(20.0, 10.0, MOST_UNEVEN))
    _varlen(outcome, heads, kv_heads, size, 8 * (prompt + response))
    outcome.measured["attention_flops_per_s"] = median
    return outcome


def _rate() -> float:
    """FLOP/s of a matrix product in fp32."""
    a = torch.randn(1024, 1024, device=platform().device)
    return 2 * 1024**3 / seconds_of(lambda: a @ a)


def _varlen(outcome: Outcome, heads: int, kv_heads: int, size: int, tokens: int) -> None:
    """For comparison: torch's own flash attention of a row of eight equal sequences."""
    name = "flash attention of torch over a row of equal sequences, forward"
    if not platform().has_gpu:
        outcome.skip(name, "its kernels are for GPUs")
        return
    length = tokens // 8
    query, key, value = (
        torch.randn(8 * length, count, size, device=platform().device, dtype=torch.bfloat16)
        for count in (heads, kv_heads, kv_heads)
    )
    ends = torch.arange(0, 8 * length + 1, length, device=platform().device, dtype=torch.int32)
    flash = torch.ops.aten._flash_attention_forward
    rows = (query, key, value, ends, ends, length, length)
    seconds = seconds_of(lambda: flash(*rows, dropout_p=0.0, is_causal=True, return_debug_mask=False))
    segments = [Segment(place * length, length) for place in range(8)]
    outcome.tell(name, f"{flops_of(segments, heads=heads, size=size) / seconds / 1e12:.0f} TFLOP/s")
