"""Attention of packed sequences in two calls that also hand out, and take, the log-sum-exp of every query.

With it, attentions of the same queries to different keys can be merged exactly, and the gradients of each follow from
the merged output (`attention.py`). On a GPU the calls are torch's flash kernels for sequences of variable length, those
of version 3 where they are installed. On a CPU they are torch's flash kernel for CPUs, a sequence at a time, or a few
short ones. What no flash kernel takes, fp32 on a GPU, is written out.

Shapes: queries [Q, heads, d], keys and values [K, kv_heads, d], log-sum-exp [heads, Q]. `heads` is a multiple of
`kv_heads`, and neighbouring heads share theirs. No key or value is copied or repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import attention

_ROWS = 256  # queries whose scores are masked, or written out, at once
_SHORT = 64  # neighbouring sequences are one call of a CPU while they have at most so many queries and so many keys
_CALL_BYTES = 2**24  # of the queries of a call of a CPU, if they are of more than one key head
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
        """Sequences of the given lengths, one behind the other. Each has a query and a key at least, and a causal one
        at least as many keys as queries."""
        places = []
        for lengths in (query_lengths, key_lengths):
            ends = [0]
            for length in lengths:
                ends.append(ends[-1] + length)
            places.append(tuple(ends))
        offsets = tuple(torch.tensor(each, dtype=torch.int32, device=device) for each in places)
        return cls(*places, causal=causal, window=window, offsets=offsets)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a sequence."""
        return tuple(max(end - start for start, end in pairwise(each)) for each in (self.queries, self.keys))  # type: ignore[return-value]

    @cached_property
    def blocks(self) -> tuple[_ScoreBlock, ...]:
        """The calls that compute them where a call computes one block of scores."""
        return tuple(_blocks(self))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    *,
    onto: tuple[Tensor, Tensor] | None = None,
    repeatable: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output [Q, heads, d], and the log-sum-exp [heads, Q] of the scaled scores of each query.

    `onto` are the output and the log-sum-exp of the same queries with other keys: these keys are merged into them, in
    place. `repeatable` keeps kernels from adding numbers in an order that differs from call to call.
    """
    if _has_flash(query):
        with _deterministic(repeatable):
            found = _forward_on_gpu(query, key, value, *_lengths(sequences), False, **_options(sequences, scale))[:2]
        if onto is None:
            return found
        merge(onto[0].transpose(0, 1), onto[1], found[0].transpose(0, 1), found[1])
        return onto
    kernel = _forward_on_cpu if query.is_cpu else _forward_written_out
    heads, groups = query.shape[1], key.shape[1]
    output, logsumexp = onto or (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty(heads, query.shape[0], dtype=_exact(query.dtype)),
    )
    queries, outputs = (_by_group(each, groups) for each in (query, output))  # views of all, of which a block is a part
    keys, values, sums = _shared(key, heads), _shared(value, heads), logsumexp.unflatten(0, (groups, -1))
    for block, rows, seen in _calls(sequences, query, groups):
        found = kernel(
            queries[rows],
            keys[seen],
            values[seen],
            0.0,
            block.causal,
            attn_mask=block.mask_for(query),
            scale=scale,
        )
        if onto or block.merges:
            merge(outputs[rows], sums[rows], *found)
        else:
            outputs[rows], sums[rows] = found
        del found  # before the next call
    return output, logsumexp


def add_gradients(
    totals: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    sequences: Sequences,
    scale: float,
    *,
    repeatable: bool = False,
) -> None:
    """Add the gradients of queries, keys and values to the `totals`, given that of the output.

    Totals of keys and values are in fp32, or fp64. `output` and `logsumexp` may be those of more keys than `key` has,
    with which these were merged: what is added are then the parts of the gradients that come from these keys.
    """
    if _has_flash(query):
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of dropout, which there is none of
        inputs = (grad, query, key, value, output, logsumexp.contiguous())
        with _deterministic(repeatable):
            found = _backward_on_gpu(*inputs, *_lengths(sequences), unused, unused, **_options(sequences, scale))
        for total, part in zip(totals, found, strict=True):
            total += part
        return
    kernel = _backward_on_cpu if query.is_cpu else _backward_written_out
    exact, heads, groups = _exact(query.dtype), query.shape[1], key.shape[1]
    grads, queries, outputs, of_query = (_by_group(each, groups) for each in (grad, query, output, totals[0]))
    of_keys = [each.transpose(0, 1) for each in totals[1:]]  # [kv_heads, K, d]
    keys, values, sums = _shared(key, heads), _shared(value, heads), logsumexp.unflatten(0, (groups, -1))
    for block, rows, seen in _calls(sequences, query, groups):
        found = kernel(
            grads[rows],
            queries[rows],
            keys[seen],
            values[seen],
            outputs[rows],
            sums[rows].contiguous(),
            0.0,
            block.causal,
            attn_mask=block.mask_for(query),
            scale=scale,
        )
        of_query[rows] += found[0]
        for total, part in zip(of_keys, found[1:], strict=True):
            total[seen[0], seen[2]] += (part.sum(1, dtype=exact) if part.shape[1] > 1 else part[:, 0]).to(key.dtype)
        del found, part  # before the next call


def merge(output: Tensor, logsumexp: Tensor, other_output: Tensor, other_logsumexp: Tensor) -> None:
    """Merge the attention of the same queries to other keys into `output` [..., Q, d] and `logsumexp` [..., Q]."""
    merged = torch.logaddexp(logsumexp, other_logsumexp)
    share, other_share = ((each - merged).exp_()[..., None] for each in (logsumexp, other_logsumexp))
    output.copy_((other_output * other_share).addcmul_(output, share))
    logsumexp.copy_(merged)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of numbers of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- on a GPU


def _has_flash(rows: Tensor) -> bool:
    """Whether a flash kernel for sequences of variable length takes these."""
    return not rows.is_cpu and rows.dtype in (torch.bfloat16, torch.float16) and _newest_flash(rows.device)


@cache
def _newest_flash(device: torch.device) -> bool:
    """Have torch use the flash kernels of version 3 where they are installed and the GPU is one that they are for."""
    known = getattr(attention, "list_flash_attention_impls", list)()  # by this torch
    made_for_it = torch.get_device_module(device).get_device_capability(device)[0] == 9
    if made_for_it and "FA3" in known and find_spec("flash_attn_interface"):
        attention.activate_flash_attention_impl("FA3")
    return True


def _lengths(sequences: Sequences) -> tuple[Tensor | int | float | bool, ...]:
    """The arguments that flash kernels have in common: lengths, the rate of dropout, and whether they are causal."""
    return (*sequences.offsets, *sequences.longest, 0.0, sequences.causal)


def _options(sequences: Sequences, scale: float) -> dict[str, float | int | None]:
    """The options of flash kernels; they count the keys before and after a query's own."""
    left, right = (None, None) if sequences.window is None else (sequences.window - 1, 0)
    return {"scale": scale, "window_size_left": left, "window_size_right": right}


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Have torch choose kernels whose results are the same each time; they ask torch for it, not their caller."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# ---------------------------------------------------------------- blocks of scores


class _ScoreBlock(NamedTuple):
    """Queries and keys of one call."""

    queries: slice
    keys: slice
    causal: bool = False  # there are as many queries as keys, and each sees those up to its own
    mask: Tensor | tuple[int, int, int, int] | None = None  # [queries, keys], added to the scores, or how to make it
    merges: bool = False  # an earlier block has the same queries, with other keys

    def mask_for(self, rows: Tensor) -> Tensor | None:
        """The mask in the dtype of `rows`, on their device."""
        mask = _band(*self.mask) if isinstance(self.mask, tuple) else self.mask
        return None if mask is None else mask.to(rows.device, rows.dtype)


def _calls(
    sequences: Sequences, query: Tensor, groups: int
) -> Iterator[tuple[_ScoreBlock, tuple[slice, ...], tuple[slice, ...]]]:
    """Each block with its queries and keys as places in [kv_heads, heads / kv_heads, L, d], of a part of the heads.

    What a call hands out is copied, so a call for a long block has so few heads that the copy is small.
    """
    every = slice(None)
    for block in sequences.blocks:
        longest = max(block.queries.stop - block.queries.start, block.keys.stop - block.keys.start)
        size = longest * query[0].nbytes // groups  # of one key head's queries, and of the gradients of its keys
        step = max(1, _CALL_BYTES // size)
        for first in range(0, groups, step):
            heads = slice(first, min(first + step, groups))
            yield block, (heads, every, block.queries), (heads, every, block.keys)


def _blocks(sequences: Sequences) -> Iterator[_ScoreBlock]:
    """The calls that compute the sequences."""
    places = list(zip(pairwise(sequences.queries), pairwise(sequences.keys), strict=True))
    while places:
        (start, _), (first, _) = places[0]
        count = 0
        while count < len(places) and places[count][0][1] - start <= _SHORT and places[count][1][1] - first <= _SHORT:
            count += 1
        if count > 1:
            yield _of_short_ones(places[:count], sequences)
        else:
            yield from _of_one(*places[0], sequences)
        places = places[max(count, 1) :]


def _of_short_ones(places: Sequence[tuple[tuple[int, int], tuple[int, int]]], sequences: Sequences) -> _ScoreBlock:
    """Neighbouring short sequences in one call, with a mask that keeps them apart."""
    (start, _), (first, _) = places[0]
    (_, end), (_, last) = places[-1]
    mask = torch.full((end - start, last - first), -torch.inf)
    for (row, until), (key, stop) in places:
        rows, keys, before = until - row, stop - key, stop - key - (until - row)
        own = _band(rows, keys, before if sequences.causal else keys, sequences.window or keys + rows)
        mask[row - start : until - start, key - first : stop - first] = own
    return _ScoreBlock(slice(start, end), slice(first, last), mask=mask)


def _of_one(queries: tuple[int, int], keys: tuple[int, int], sequences: Sequences) -> Iterator[_ScoreBlock]:
    """One sequence. Only a window needs a mask, of few queries at a time."""
    (start, end), (first, last) = queries, keys
    before = last - first - (end - start)
    if not sequences.causal:
        yield _ScoreBlock(slice(start, end), slice(first, last))
    elif sequences.window is None or sequences.window >= last - first:
        yield _ScoreBlock(slice(start, end), slice(first + before, last), causal=True)
        if before:
            yield _ScoreBlock(slice(start, end), slice(first, first + before), merges=True)
    else:
        for row in range(0, end - start, _ROWS):
            until, lowest = min(row + _ROWS, end - start), max(0, before + row - sequences.window + 1)
            seen = slice(first + lowest, first + before + until)
            shape = (until - row, seen.stop - seen.start, before + row - lowest, sequences.window)
            yield _ScoreBlock(slice(start + row, start + until), seen, mask=shape)


@lru_cache(maxsize=32)
def _band(queries: int, keys: int, before: int, window: int) -> Tensor:
    """A mask [queries, keys] float32 to add to scores: a query sees its own key and the window - 1 before it.

    The first query's own key has `before` keys before it.
    """
    seen = torch.ones(queries, keys, dtype=torch.bool).tril_(before).triu_(before - window + 1)
    return torch.zeros(queries, keys).masked_fill_(~seen, -torch.inf)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Heads that share a key head, next to each other: [L, heads, d] -> [kv_heads, heads / kv_heads, L, d], a view."""
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _shared(rows: Tensor, heads: int) -> Tensor:
    """Key heads, each as all heads that share it: [L, kv_heads, d] -> [kv_heads, heads / kv_heads, L, d], a view."""
    groups = rows.shape[1]
    return rows.transpose(0, 1)[:, None].expand(-1, heads // groups, -1, -1)


def _scores(
    query: Tensor, key: Tensor, rows: slice, causal: bool, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, int]:
    """The scaled and masked scores of some queries with the keys that they see, and how many keys these are."""
    count = rows.stop if causal else key.shape[2]
    scores = (query[:, :, rows] @ key[:, :, :count].transpose(2, 3)).to(_exact(query.dtype)) * scale
    if causal:
        attn_mask = _band(rows.stop - rows.start, count, rows.start, count + 1).to(scores)
    elif attn_mask is not None:
        attn_mask = attn_mask[rows]
    return scores if attn_mask is None else scores + attn_mask, count


def _forward_written_out(query, key, value, _, causal, *, attn_mask, scale):
    output, logsumexp = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_exact(query.dtype))
    for start in range(0, query.shape[2], _ROWS):
        rows = slice(start, min(start + _ROWS, query.shape[2]))
        scores, count = _scores(query, key, rows, causal, attn_mask, scale)
        logsumexp[:, :, rows] = scores.logsumexp(-1)
        output[:, :, rows] = scores.softmax(-1).to(value.dtype) @ value[:, :, :count]
    return output, logsumexp


def _backward_written_out(grad, query, key, value, output, logsumexp, _, causal, *, attn_mask, scale):
    found = (
        torch.zeros_like(query),
        *(torch.zeros(each.shape, dtype=each.dtype, device=each.device) for each in (key, value)),
    )
    for start in range(0, query.shape[2], _ROWS):
        rows = slice(start, min(start + _ROWS, query.shape[2]))
        scores, count = _scores(query, key, rows, causal, attn_mask, scale)
        shares = (scores - logsumexp[:, :, rows, None]).exp()
        delta = (grad[:, :, rows] * output[:, :, rows]).sum(-1, keepdim=True)
        inner = shares * (grad[:, :, rows] @ value[:, :, :count].transpose(2, 3) - delta) * scale
        inner, shares = inner.to(query.dtype), shares.to(query.dtype)
        found[0][:, :, rows] = inner @ key[:, :, :count]
        found[1][:, :, :count] += inner.transpose(2, 3) @ query[:, :, rows]
        found[2][:, :, :count] += shares.transpose(2, 3) @ grad[:, :, rows]
    return found
