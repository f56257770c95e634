"""Core attention of packed rollouts: a prompt cascade, exact, for every device.

A row is packed with its prompts first and the responses behind them, so all queries, keys and values of a call are
views of the row. Every segment attends to itself, causally. The responses of a group attend to their prompt in a second
call, in which they are one long sequence of queries, since every one of them sees the whole prompt. The two are merged
by their log-sum-exps:

    m = logaddexp(l1, l2),    output = exp(l1 - m) output1 + exp(l2 - m) output2

Flash kernels compute gradients from an output and its log-sum-exp. Given the merged ones, each call computes its part
of the whole gradients, and these parts are added.

Under context parallelism a rank has two chunks of the row as queries, and gathers the keys. Those that a chunk's
queries see are consecutive, so there are the same calls for each chunk.

With a sliding window that is shorter than a segment and its context, a query sees a part of the prompt that depends on
its place. The keys that such a row's segments see are copied then, and there is one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from clipo_megatron.flow import Segment
from clipo_megatron.policy.model.attention_kernels import Sequences, add_gradients, attend
from clipo_megatron.policy.row_share import WHOLE_ROW, RowShare


class AttentionPart(NamedTuple):
    """One call: some queries of the rank's part of a row, and keys of the row that they attend to."""

    queries: slice
    keys: slice | Tensor  # a tensor [K] int64 names keys that are copied
    sequences: Sequences


@dataclass
class AttentionPlan(PackedSeqParams):
    """The calls that compute the attention of one packed row on this rank; made once a micro-batch.

    Megatron passes it to every layer, and to its attention, as `packed_seq_params`. Its `qkv_format` is not "thd", so
    that Megatron leaves shapes and rotary embeddings alone.
    """

    own: tuple[AttentionPart, ...] = ()  # one for each chunk of the rank, in order: its queries and their own segments
    contexts: tuple[AttentionPart, ...] = ()  # queries and their contexts, to be merged with those
    share: RowShare = WHOLE_ROW
    routes: Tensor | None = None  # [n, L, E] int16, the experts of the rank's tokens; see `experts.replay_routes`


def plan_attention(
    segments: Sequence[Segment],
    device: torch.device,
    window: int | None = None,
    share: RowShare = WHOLE_ROW,
) -> AttentionPlan:
    """The calls for the segments of a packed row.

    Args:
        segments: those of the row, in order. Those with the same context are neighbours, and contexts are in the order
            of the segments that attend to them, without tokens between them.
        device: where the tensors of the plan go.
        window: keys that a query sees, including its own; None: all up to its own.
        share: the rank's part of the row.

    Raises:
        ValueError: the row is packed in another order.
    """
    limited = window is not None and any(window < each.context_length + each.length for each in segments)
    own, contexts, place = [], [], 0
    for chunk in share.chunks(segments[-1].start + segments[-1].length):
        if limited:
            own.append(_windowed(segments, chunk, place, window, device))
        else:
            first, *others = _cascade(segments, chunk, place, device)
            own.append(first)
            contexts += others
        place += chunk.stop - chunk.start
    return AttentionPlan(qkv_format="segments", own=tuple(own), contexts=tuple(contexts), share=share)


def _cascade(segments: Sequence[Segment], chunk: slice, place: int, device: torch.device) -> Iterator[AttentionPart]:
    """The calls for the queries of a chunk of the row, which are at `place` among the queries of this rank."""
    here = [each for each in segments if each.start < chunk.stop and each.start + each.length > chunk.start]
    ends = [min(each.start + each.length, chunk.stop) for each in here]
    begins = [max(each.start, chunk.start) for each in here]
    queries = [end - begin for begin, end in zip(begins, ends, strict=True)]
    keys = [end - each.start for each, end in zip(here, ends, strict=True)]
    own = Sequences.of(queries, keys, device, causal=True)
    size = chunk.stop - chunk.start
    yield AttentionPart(slice(place, place + size), slice(here[0].start, chunk.stop), own)

    contexts: dict[tuple[int, int], int] = {}  # place and length of each context, and the queries that attend to it
    readers = [number for number, each in enumerate(here) if each.context_length]
    for number in readers:
        context = here[number].context_start, here[number].context_length
        contexts[context] = contexts.get(context, 0) + queries[number]
    if not readers:
        return
    if readers != list(range(readers[0], readers[-1] + 1)) or _changes(here[n] for n in readers) != len(contexts):
        raise ValueError("segments with a context are neighbours in a packed row, and these are not")
    first, last = begins[readers[0]] - chunk.start, ends[readers[-1]] - chunk.start
    start = end = next(iter(contexts))[0]
    for context, length in contexts:
        if context != end:
            raise ValueError("contexts stand in the order of their readers, one behind the other, and these do not")
        end += length
    shared = Sequences.of(list(contexts.values()), [length for _, length in contexts], device, causal=False)
    yield AttentionPart(slice(place + first, place + last), slice(start, end), shared)


def _changes(segments: Iterator[Segment]) -> int:
    """How many runs of segments with the same context there are."""
    contexts = [each.context_start for each in segments]
    return 1 + sum(before != after for before, after in pairwise(contexts))


def _windowed(
    segments: Sequence[Segment], chunk: slice, place: int, window: int, device: torch.device
) -> AttentionPart:
    """The call for a chunk of a row with a window: each segment has copies of the keys that it sees."""
    lengths, counts, keys = [], [], []
    for each in segments:
        begin, end = max(each.start, chunk.start), min(each.start + each.length, chunk.stop)
        if begin >= end:
            continue
        context = torch.arange(each.context_start, each.context_start + each.context_length)
        seen = torch.cat([context, torch.arange(each.start, end)])[-(end - begin + window - 1) :]
        lengths.append(end - begin)
        counts.append(seen.numel())
        keys.append(seen)
    sequences = Sequences.of(lengths, counts, device, causal=True, window=window)
    return AttentionPart(slice(place, place + sum(lengths)), torch.cat(keys).to(device), sequences)


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
            query: [T, 1, heads, head_dim], the rank's part of the row.
            key: [T, 1, kv_heads, head_dim], its part; `value` likewise.
            packed_seq_params: the row's plan.
        """
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        rows = [each.squeeze(1) for each in (query, key, value)]
        output = attention_of(*rows, packed_seq_params, scale, repeatable=self.config.deterministic_mode)
        return output.flatten(1).unsqueeze(1)


def attention_of(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float, *, repeatable: bool = False
) -> Tensor:
    """The attention [T, heads, head_dim] of a row by its plan.

    Args:
        query: [T, heads, head_dim], the rank's part of the row.
        key: [T, kv_heads, head_dim], its part; `value` likewise.
        plan: of the row, on this rank.
        scale: factor of the scores.
        repeatable: whether gradients have to be the same to the bit each time, which is slower on GPUs.
    """
    return _Cascade.apply(query, key, value, plan, scale, repeatable)


class _Cascade(torch.autograd.Function):
    """The attention of a row by the parts of its plan."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float, repeatable: bool
    ) -> Tensor:
        keys, values = (plan.share.gathered(each) for each in (key, value))

        def found(part: AttentionPart, onto: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
            rows = query[part.queries], keys[part.keys], values[part.keys]
            return attend(*rows, part.sequences, scale, onto=onto, repeatable=repeatable)

        outputs, sums = zip(*map(found, plan.own), strict=True)
        output, logsumexp = (outputs[0], sums[0]) if len(outputs) == 1 else (torch.cat(outputs), torch.cat(sums, 1))
        for part in plan.contexts:
            found(part, (output[part.queries], logsumexp[:, part.queries]))
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.scale, ctx.repeatable = plan, scale, repeatable
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, logsumexp = ctx.saved_tensors
        plan, grad = ctx.plan, grad.contiguous()
        keys, values = (plan.share.gathered(each) for each in (key, value))  # again: whole rows are not kept
        exact = torch.promote_types(key.dtype, torch.float32)
        grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        totals = [torch.zeros(each.shape, dtype=exact, device=each.device) for each in (keys, values)]
        for part in (*plan.own, *plan.contexts):
            rows = grad[part.queries], query[part.queries], keys[part.keys], values[part.keys], output[part.queries]
            sums, copied = logsumexp[:, part.queries], isinstance(part.keys, Tensor)
            # Views, to which the gradients are added; those of copied keys are added to the totals afterwards.
            of_keys = [total.new_zeros(rows[2].shape) if copied else total[part.keys] for total in totals]
            onto = grad_query[part.queries], *of_keys
            add_gradients(onto, *rows, sums, part.sequences, ctx.scale, repeatable=ctx.repeatable)
            if copied:
                for total, more in zip(totals, of_keys, strict=True):
                    total.index_add_(0, part.keys, more)
        del keys, values
        grad_key, grad_value = (plan.share.scattered(total).to(key.dtype) for total in totals)
        return grad_query, grad_key, grad_value, None, None, None
