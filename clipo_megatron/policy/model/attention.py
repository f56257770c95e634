"""Core attention for packed segments on `scaled_dot_product_attention`: CPUs, and GPUs without transformer-engine.

A segment's queries are its own tokens; its keys are the tokens of its context, followed by its own. The causal mask is
aligned at the lower right. Segments with the same context length and similar lengths of their own form a batch, padded
on the right inside the attention only: a padded key comes after every real query, so the causal mask hides it and
nothing leaks between segments.

With a sliding window of w a query sees w keys, the last of which is its own. A mask is built only where the window is
shorter than a segment with its context; context tokens that no query sees are left out.
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

# Segments share a batch while the longest has at most GROWTH times the tokens of the shortest, plus SLACK.
GROWTH, SLACK = 1.25, 4


@dataclass(frozen=True)
class SegmentBatch:
    """Segments that one call of the attention computes together."""

    count: int
    length: int  # queries of each, padding included
    context: int  # keys of each from its context
    mask: Tensor | None  # [length, context + length] bool, True where attended; None: causal


@dataclass
class SegmentPlan(PackedSeqParams):
    """How the segments of one packed row are batched for attention; made once a micro-batch.

    Megatron passes it to the attention as `packed_seq_params`. Its `qkv_format` is not "thd", so that Megatron leaves
    shapes and rotary embeddings alone.
    """

    queries: Tensor | None = None  # [sum count*length] int64, the token of each padded query, batch after batch
    keys: Tensor | None = None  # [sum count*(context+length)] int64, the token of each padded key
    restore: Tensor | None = None  # [T] int64, the padded query of each token
    buckets: tuple[SegmentBatch, ...] = ()


def plan_segments(segments: Sequence[Segment], device: torch.device, window: int | None = None) -> SegmentPlan:
    """Batch segments by the length of their context and their own.

    Args:
        segments: those of the packed row, in order.
        device: where index tensors and masks go.
        window: keys that a query sees, including its own; None: all up to its own.
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
            # Padding reads the segment's last token: any finite value would do, because its output is dropped.
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
    """The segment without the part of its context that lies before the window of its first query."""
    unseen = max(0, segment.context_length - (window - 1))
    return segment._replace(
        context_start=segment.context_start + unseen, context_length=segment.context_length - unseen
    )


def _mask(length: int, context: int, window: int | None, device: torch.device) -> Tensor | None:
    """A mask [length, context + length] bool, True where attended; None where the causal mask is the same."""
    limits = window is not None and window < context + length
    if not context and not limits:
        return None
    mask = torch.ones(length, context + length, dtype=torch.bool, device=device).tril_(diagonal=context)
    return mask.triu_(diagonal=context - window + 1) if limits else mask


class PackedAttention(MegatronModule):
    """Attention of the segments of a packed row to themselves and their contexts; knows grouped-query heads."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: SegmentPlan, **__: Any
    ) -> Tensor:
        """Compute the attention output [T, 1, heads * head_dim].

        Args:
            query: [T, 1, heads, head_dim].
            key: [T, 1, kv_heads, head_dim]; `value` likewise.
            packed_seq_params: the row's plan.
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
    """Reshape [count * length, heads, head_dim] to [count, heads, length, head_dim]."""
    return rows.unflatten(0, (count, -1)).transpose(1, 2)
