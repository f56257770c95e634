"""Core attention for packed segments on `scaled_dot_product_attention`: CPUs, and GPUs without transformer-engine.

Every segment has queries (its own tokens) and keys (its context's tokens, then its own), causal at the lower right.
Segments with the same context length and similar own lengths are attended to together, right-padded inside the
attention only: under the causal mask a padded key lies behind every real query, so nothing leaks between segments.

A sliding window of w lets a query see w keys, itself the last of them. Only then are masks wider than the causal one
made, and only for segments that the window is too short for; of a context, what no query sees is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clipo_megatron.flow import Segment

# Segments share a bucket while the longest is at most this much longer than the shortest, plus SLACK tokens.
GROWTH, SLACK = 1.25, 4


@dataclass(frozen=True)
class SegmentBatch:
    """Segments that are attended to side by side."""

    count: int
    length: int  # of their queries, padded
    context: int  # keys before their own
    mask: Tensor | None  # [length, context + length] bool, True where attended; None: plainly causal


@dataclass
class SegmentPlan(PackedSeqParams):
    """How the segments of one packed row are laid side by side for attention; made once a micro-batch.

    It travels through Megatron as `packed_seq_params`; its `qkv_format` is not "thd", so that Megatron leaves shapes
    and rotary embeddings alone.
    """

    queries: Tensor | None = None  # [sum count*length] int64, token of each padded query, bucket after bucket
    keys: Tensor | None = None  # [sum count*(context+length)] int64, token of each padded key
    restore: Tensor | None = None  # [T] int64, padded query of each token
    buckets: tuple[SegmentBatch, ...] = ()


def plan_segments(segments: Sequence[Segment], device: torch.device, window: int | None = None) -> SegmentPlan:
    """Bucket segments by context length and own length.

    Args:
        segments: of the row.
        device: where index tensors and masks go.
        window: keys that a query sees, its own among them; None: all before it.
    """
    if window is not None:
        segments = [_within(each, window) for each in segments]
    waiting = sorted(segments, key=lambda each: (each.context_length, each.length), reverse=True)
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    buckets: list[SegmentBatch] = []
    restore = torch.empty(sum(each.length for each in segments), dtype=torch.int64)
    place = 0
    while waiting:
        context, longest = waiting[0].context_length, waiting[0].length
        count = sum(1 for each in waiting if each.context_length == context and each.length * GROWTH + SLACK >= longest)
        bucket, waiting = waiting[:count], waiting[count:]
        for each in bucket:
            # Padding reads the segment's last token: any finite value does, its output is dropped.
            own = torch.arange(longest).clamp_(max=each.length - 1).add_(each.start)
            queries.append(own)
            keys += [torch.arange(each.context_start, each.context_start + context), own]
            restore[each.start : each.start + each.length] = torch.arange(place, place + each.length)
            place += longest
        buckets.append(SegmentBatch(count, longest, context, _mask(longest, context, window, device)))
    return SegmentPlan(
        qkv_format="segments",
        queries=torch.cat(queries).to(device),
        keys=torch.cat(keys).to(device),
        restore=restore.to(device),
        buckets=tuple(buckets),
    )


def _within(segment: Segment, window: int) -> Segment:
    """The segment without the start of its context that lies outside the window of its first query."""
    unseen = max(0, segment.context_length - (window - 1))
    return segment._replace(
        context_start=segment.context_start + unseen, context_length=segment.context_length - unseen
    )


def _mask(length: int, context: int, window: int | None, device: torch.device) -> Tensor | None:
    """[length, context + length] bool, True where attended; None where plain causality says the same."""
    limits = window is not None and window < context + length
    if not context and not limits:
        return None
    mask = torch.ones(length, context + length, dtype=torch.bool, device=device).tril_(diagonal=context)
    return mask.triu_(diagonal=context - window + 1) if limits else mask


class PackedAttention(MegatronModule):
    """Attention within the segments of a packed row and to their contexts, grouped-query heads included."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: SegmentPlan, **__: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, 1, heads, head_dim].
            key: [T, 1, kv_heads, head_dim]; `value` likewise.
            packed_seq_params: the row's plan.

        Returns:
            [T, 1, heads * head_dim].
        """
        plan = packed_seq_params
        grouped = query.shape[2] != key.shape[2]
        padded_query = query.squeeze(1).index_select(0, plan.queries)
        padded_key, padded_value = (each.squeeze(1).index_select(0, plan.keys) for each in (key, value))
        outputs, place, key_place = [], 0, 0
        for bucket in plan.buckets:
            rows, key_rows = bucket.count * bucket.length, bucket.count * (bucket.context + bucket.length)
            out = scaled_dot_product_attention(
                _batched(padded_query[place : place + rows], bucket.count),
                _batched(padded_key[key_place : key_place + key_rows], bucket.count),
                _batched(padded_value[key_place : key_place + key_rows], bucket.count),
                attn_mask=bucket.mask,
                is_causal=bucket.mask is None,
                scale=self.softmax_scale,
                enable_gqa=grouped,
            )
            outputs.append(out.transpose(1, 2).reshape(rows, -1))
            place, key_place = place + rows, key_place + key_rows
        return torch.cat(outputs).index_select(0, plan.restore).unsqueeze(1)


def _batched(rows: Tensor, count: int) -> Tensor:
    """[count * length, heads, head_dim] -> [count, heads, length, head_dim]."""
    return rows.unflatten(0, (count, -1)).transpose(1, 2)
