"""Core attention for packed segments on `scaled_dot_product_attention`: CPUs, and GPUs without transformer-engine.

Segments of similar length are attended to together, right-padded inside the attention only: under a causal mask a
padded key lies behind every real query, so no mask is needed and nothing leaks between segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Segments share a bucket while the longest is at most this much longer than the shortest.
BUCKET_GROWTH = 1.25


@dataclass
class SegmentPlan(PackedSeqParams):
    """How the segments of one packed row are laid side by side for attention; made once a micro-batch.

    It travels through Megatron as `packed_seq_params`; its `qkv_format` is not "thd", so that Megatron leaves shapes
    and rotary embeddings alone.
    """

    gather: Tensor | None = None  # [sum n*L] int64, token of each padded place, bucket after bucket
    restore: Tensor | None = None  # [T] int64, padded place of each token
    buckets: tuple[tuple[int, int], ...] = ()  # (n segments, L padded length)


def plan_segments(boundaries: list[int], device: torch.device) -> SegmentPlan:
    """Bucket segments by length.

    Args:
        boundaries: S+1 offsets, ascending from 0.
        device: where the index tensors go.
    """
    spans = [(end - start, start) for start, end in pairwise(boundaries) if end > start]
    spans.sort(reverse=True)
    gather: list[Tensor] = []
    restore = torch.empty(boundaries[-1], dtype=torch.int64)
    buckets: list[tuple[int, int]] = []
    place = 0
    while spans:
        longest = spans[0][0]
        count = sum(1 for length, _ in spans if length * BUCKET_GROWTH >= longest)
        bucket, spans = spans[:count], spans[count:]
        for length, start in bucket:
            # Padding reads the segment's last token: any finite value does, its output is dropped.
            gather.append(torch.arange(longest).clamp_(max=length - 1).add_(start))
            restore[start : start + length] = torch.arange(place, place + length)
            place += longest
        buckets.append((count, longest))
    return SegmentPlan(
        qkv_format="segments",
        gather=torch.cat(gather).to(device),
        restore=restore.to(device),
        buckets=tuple(buckets),
    )


class PackedAttention(MegatronModule):
    """Causal attention within each segment of a packed row, grouped-query heads included."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: SegmentPlan, **__: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, 1, heads, head_dim]. key, value: [T, 1, kv_heads, head_dim].
            packed_seq_params: the row's plan.

        Returns:
            [T, 1, heads * head_dim].
        """
        plan = packed_seq_params
        padded = [tensor.squeeze(1).index_select(0, plan.gather) for tensor in (query, key, value)]
        grouped = query.shape[2] != key.shape[2]
        outputs, place = [], 0
        for count, length in plan.buckets:
            q, k, v = (
                tensor[place : place + count * length].unflatten(0, (count, length)).transpose(1, 2)
                for tensor in padded
            )
            out = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
            )  # fmt: skip
            outputs.append(out.transpose(1, 2).reshape(count * length, -1))
            place += count * length
        return torch.cat(outputs).index_select(0, plan.restore).unsqueeze(1)
