"""Core attention of packed rollouts: a prompt cascade, exact, for every device.

A row is packed with its prompts first and the responses behind them, so all queries, keys and values of a call are
views of the row. Every segment attends to itself, causally. The responses of a group attend to their prompt in a second
call, in which they are one long sequence of queries, since every one of them sees the whole prompt. The two are merged
by their log-sum-exps:

    m = logaddexp(l1, l2),    output = exp(l1 - m) output1 + exp(l2 - m) output2

Flash kernels compute gradients from an output and its log-sum-exp. Given the merged ones, each call computes its part
of the whole gradients, and these parts are added.

With a sliding window that is shorter than a segment and its context, a query sees a part of the prompt that depends on
its place. The keys that such a row's segments see are copied then, and there is one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from clipo_megatron.flow import Segment
from clipo_megatron.policy.model.attention_kernels import Sequences, attend, gradients


class AttentionPart(NamedTuple):
    """One call: some queries of the row and the keys that they attend to."""

    queries: slice
    keys: slice | Tensor  # a tensor [K] int64 names keys that are copied
    sequences: Sequences


@dataclass
class AttentionPlan(PackedSeqParams):
    """The calls that compute the attention of one packed row; made once a micro-batch.

    Megatron passes it to the attention as `packed_seq_params`. Its `qkv_format` is not "thd", so that Megatron leaves
    shapes and rotary embeddings alone.
    """

    parts: tuple[AttentionPart, ...] = ()  # the first has all queries; those of others are merged with it


def plan_attention(segments: Sequence[Segment], device: torch.device, window: int | None = None) -> AttentionPlan:
    """The calls for the segments of a packed row.

    Args:
        segments: those of the row, in order. Those with the same context are neighbours, and contexts are in the order
            of the segments that attend to them, without tokens between them.
        device: where the tensors of the plan go.
        window: keys that a query sees, including its own; None: all up to its own.

    Raises:
        ValueError: the row is packed in another order.
    """
    if window is not None and any(window < each.context_length + each.length for each in segments):
        return AttentionPlan(qkv_format="segments", parts=(_windowed(segments, device, window),))
    lengths = [each.length for each in segments]
    row = slice(0, sum(lengths))
    parts = [AttentionPart(row, row, Sequences.of(lengths, lengths, device, causal=True))]
    readers = [each for each in segments if each.context_length]
    if readers:
        parts.append(_to_contexts(readers, device))
    return AttentionPlan(qkv_format="segments", parts=tuple(parts))


def _to_contexts(readers: Sequence[Segment], device: torch.device) -> AttentionPart:
    """The call in which segments attend to their contexts."""
    first, last, end = readers[0], readers[-1], readers[0].start
    contexts, queries = [], []
    for context, group in groupby(readers, key=lambda each: (each.context_start, each.context_length)):
        contexts.append(context)
        queries.append(0)
        for each in group:
            if each.start != end:
                raise ValueError("segments with a context are neighbours in a packed row, and these are not")
            queries[-1] += each.length
            end += each.length
    place = first.context_start
    for start, length in contexts:
        if start != place:
            raise ValueError("contexts stand in the order of their readers, one behind the other, and these do not")
        place += length
    sequences = Sequences.of(queries, [length for _, length in contexts], device, causal=False)
    return AttentionPart(slice(first.start, last.start + last.length), slice(first.context_start, place), sequences)


def _windowed(segments: Sequence[Segment], device: torch.device, window: int) -> AttentionPart:
    """The call for segments with a window: each has copies of the keys of its context that it sees, and its own."""
    keys, counts = [], []
    for each in segments:
        seen = min(each.context_length, window - 1)  # by the first query
        end = each.context_start + each.context_length
        keys += [torch.arange(end - seen, end), torch.arange(each.start, each.start + each.length)]
        counts.append(seen + each.length)
    lengths = [each.length for each in segments]
    sequences = Sequences.of(lengths, counts, device, causal=True, window=window)
    return AttentionPart(slice(0, sum(lengths)), torch.cat(keys).to(device), sequences)


class PackedAttention(MegatronModule):
    """Attention of the segments of a packed row to themselves and their contexts; knows grouped-query heads."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: AttentionPlan, **__: Any
    ) -> Tensor:
        """Compute the attention output [T, 1, heads * head_dim].

        Args:
            query: [T, 1, heads, head_dim].
            key: [T, 1, kv_heads, head_dim]; `value` likewise.
            packed_seq_params: the row's plan.
        """
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        rows = [each.squeeze(1) for each in (query, key, value)]
        return _Cascade.apply(*rows, packed_seq_params.parts, scale).flatten(1).unsqueeze(1)


class _Cascade(torch.autograd.Function):
    """The attention of a row by the parts of its plan."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[AttentionPart], scale: float
    ) -> Tensor:
        first, *others = parts
        output, logsumexp = attend(query, key[first.keys], value[first.keys], first.sequences, scale)
        for part in others:
            found = attend(query[part.queries], key[part.keys], value[part.keys], part.sequences, scale)
            _merge(output[part.queries], logsumexp[:, part.queries], *found)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.parts, ctx.scale = parts, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, logsumexp = ctx.saved_tensors
        grad = grad.contiguous()
        totals: list[Tensor] = []
        for part in ctx.parts:
            found = gradients(
                grad[part.queries],
                query[part.queries],
                key[part.keys],
                value[part.keys],
                output[part.queries],
                logsumexp[:, part.queries],
                part.sequences,
                ctx.scale,
            )
            if isinstance(part.keys, Tensor):
                found = (found[0], *(_added_up(each, part.keys, key) for each in found[1:]))
            if not totals:
                totals = list(found)
                continue
            for total, rows, more in zip(totals, (part.queries, part.keys, part.keys), found, strict=True):
                total[rows] += more
        return (*totals, None, None)


def _merge(output: Tensor, logsumexp: Tensor, other_output: Tensor, other_logsumexp: Tensor) -> None:
    """Merge the attention to other keys into `output` and `logsumexp`."""
    merged = torch.logaddexp(logsumexp, other_logsumexp)
    share, other_share = ((each - merged).exp().T[..., None] for each in (logsumexp, other_logsumexp))
    output.copy_(output * share + other_output * other_share)
    logsumexp.copy_(merged)


def _added_up(copies: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """The gradients of keys, given those of copies of them."""
    total = torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return total.index_add_(0, places, copies.to(total.dtype)).to(like.dtype)
