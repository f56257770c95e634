"""Attention of packed sequences in two calls that also hand out, and take, the log-sum-exp of every query.

With it, two attentions of the same queries to different keys can be merged exactly, and the gradients of each follow
from the merged output (`attention.py`). On a GPU the calls are torch's flash kernels for sequences of variable length.
On a CPU they are torch's flash kernel for CPUs, a sequence at a time.

Shapes: queries [Q, heads, d], keys and values [K, kv_heads, d], log-sum-exp [heads, Q]. `heads` is a multiple of
`kv_heads`, and neighbouring heads share theirs. No key or value is copied or repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 256  # queries whose mask is made at once on a CPU
_forward_on_gpu = torch.ops.aten._flash_attention_forward
_backward_on_gpu = torch.ops.aten._flash_attention_backward
_forward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Sequences:
    """Sequences that one call computes: the queries of each attend to the keys of the same one.

    Attributes:
        queries, keys: where each begins, ascending from 0, and then the end of the last.
        causal: whether a query sees keys only up to its own, the last query of a sequence having its last key.
        window: keys that a causal query sees, including its own; None: all of them.
        offsets: `queries` and `keys` as int32 on the device of the tensors.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    window: int | None
    offsets: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        device: torch.device,
        *,
        causal: bool,
        window: int | None = None,
    ) -> Sequences:
        """Sequences of the given lengths, one behind the other."""
        places = []
        for lengths in (query_lengths, key_lengths):
            ends = [0]
            for length in lengths:
                ends.append(ends[-1] + length)
            places.append(tuple(ends))
        offsets = tuple(torch.tensor(each, dtype=torch.int32, device=device) for each in places)
        return cls(*places, causal=causal, window=window, offsets=offsets)

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a sequence."""
        return tuple(max(end - start for start, end in pairwise(each)) for each in (self.queries, self.keys))  # type: ignore[return-value]


def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    """The output [Q, heads, d], and the log-sum-exp [heads, Q] of the scaled scores of each query."""
    if not _runs_on_cpu(query):
        left, right = _window(sequences)
        output, logsumexp, *_ = _forward_on_gpu(
            query,
            key,
            value,
            *sequences.offsets,
            *sequences.longest,
            0.0,
            sequences.causal,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return output, logsumexp
    heads, groups = query.shape[1], key.shape[1]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = query.new_empty(heads, query.shape[0], dtype=_exact(query.dtype))
    queries, outputs = (_by_group(each, groups) for each in (query, output))  # views of all, of which a block is a part
    keys, values, sums = _shared(key, heads), _shared(value, heads), logsumexp.unflatten(0, (groups, -1))
    for block in _blocks(sequences, query.dtype):
        rows, seen = block.queries, block.keys
        found = _forward_on_cpu(
            queries[:, :, rows],
            keys[:, :, seen],
            values[:, :, seen],
            0.0,
            block.causal,
            attn_mask=block.mask,
            scale=scale,
        )
        outputs[:, :, rows], sums[:, :, rows] = found
    return output, logsumexp


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    sequences: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, given that of the output.

    `output` and `logsumexp` may be those of more keys than `key` has, with which these were merged: the gradients are
    then the parts of the whole attention's that come from these keys.
    """
    if not _runs_on_cpu(query):
        left, right = _window(sequences)
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of dropout, which there is none of
        return _backward_on_gpu(
            grad,
            query,
            key,
            value,
            output,
            logsumexp.contiguous(),
            *sequences.offsets,
            *sequences.longest,
            0.0,
            sequences.causal,
            unused,
            unused,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
    exact, heads, groups = _exact(query.dtype), query.shape[1], key.shape[1]
    grad_query = torch.zeros(query.shape, dtype=query.dtype)
    totals = [torch.zeros(each.transpose(0, 1).shape, dtype=exact) for each in (key, value)]  # [kv_heads, K, d]
    grads, queries, outputs, grad_queries = (_by_group(each, groups) for each in (grad, query, output, grad_query))
    keys, values, sums = _shared(key, heads), _shared(value, heads), logsumexp.unflatten(0, (groups, -1))
    for block in _blocks(sequences, query.dtype):
        rows, seen = block.queries, block.keys
        found = _backward_on_cpu(
            grads[:, :, rows],
            queries[:, :, rows],
            keys[:, :, seen],
            values[:, :, seen],
            outputs[:, :, rows],
            sums[:, :, rows].contiguous(),
            0.0,
            block.causal,
            attn_mask=block.mask,
            scale=scale,
        )
        grad_queries[:, :, rows] = found[0]
        for total, part in zip(totals, found[1:], strict=True):
            total[:, seen] += part.sum(1, dtype=exact)
    grad_key, grad_value = (total.transpose(0, 1) for total in totals)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _window(sequences: Sequences) -> tuple[int | None, int | None]:
    """The keys before and after a query's own that it sees, as flash kernels count them."""
    return (None, None) if sequences.window is None else (sequences.window - 1, 0)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of numbers of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- on a CPU


def _runs_on_cpu(rows: Tensor) -> bool:
    return rows.is_cpu


class _KernelCall(NamedTuple):
    """Queries and keys of one call of the kernel."""

    queries: slice
    keys: slice
    causal: bool  # there are as many queries as keys, and each sees those up to its own
    mask: Tensor | None  # [queries, keys], added to the scores


def _blocks(sequences: Sequences, dtype: torch.dtype) -> Iterator[_KernelCall]:
    """The calls that compute the sequences. A mask is made for few queries at a time, and only where it is needed."""
    for (start, end), (first, last) in zip(pairwise(sequences.queries), pairwise(sequences.keys), strict=True):
        queries, keys = end - start, last - first
        if not queries or not keys:
            continue
        window = sequences.window if sequences.window is not None and sequences.window < keys else None
        if not sequences.causal or (queries == keys and window is None):
            yield _KernelCall(slice(start, end), slice(first, last), sequences.causal, None)
            continue
        before = keys - queries
        for row in range(0, queries, _ROWS):
            until = min(row + _ROWS, queries)
            lowest = 0 if window is None else max(0, before + row - window + 1)
            seen = torch.ones(until - row, before + until - lowest, dtype=torch.bool).tril_(before + row - lowest)
            if window is not None:
                seen.triu_(before + row - lowest - window + 1)
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            yield _KernelCall(
                slice(start + row, start + until), slice(first + lowest, first + before + until), False, mask
            )


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Heads that share a key head, next to each other: [L, heads, d] -> [kv_heads, heads / kv_heads, L, d], a view."""
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _shared(rows: Tensor, heads: int) -> Tensor:
    """Key heads, each as all heads that share it: [L, kv_heads, d] -> [kv_heads, heads / kv_heads, L, d], a view."""
    groups = rows.shape[1]
    return rows.transpose(0, 1)[:, None].expand(-1, heads // groups, -1, -1)
