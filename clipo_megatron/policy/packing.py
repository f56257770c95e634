"""Which rank trains which rollout in which micro-batch, and the packed rows themselves. Pure functions of lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from clipo_megatron.flow import MicroBatch, Sample


def plan_micro_batches(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Divide rollouts among data-parallel ranks and micro-batches.

    Invariants: every row appears once; every rank has the same number of micro-batches; none is empty while there are
    at least as many rows as micro-batches; a micro-batch exceeds `max_tokens` only when a single rollout does.
    Ranks are balanced by tokens (longest first onto the lightest rank), and so are the micro-batches of a rank.

    Args:
        lengths: tokens of each row (prompt and response).
        ranks: data-parallel size.
        max_tokens: packed tokens of one micro-batch.

    Returns:
        plan[rank][micro_batch] = row numbers, ascending.

    Raises:
        ValueError: fewer rows than ranks.
    """
    if len(lengths) < ranks:
        raise ValueError(
            f"{len(lengths)} rollouts cannot keep {ranks} data-parallel ranks busy; raise data.prompts_per_step or "
            "rollout.samples_per_prompt, or lower algorithm.mini_batches or layout.dp"
        )
    shares = _lightest_first(range(len(lengths)), lengths, ranks)
    count = 1
    while True:
        bins = [_lightest_first(share, lengths, min(count, len(share))) for share in shares]
        overfull = any(len(rows) > 1 and sum(lengths[row] for row in rows) > max_tokens for b in bins for rows in b)
        if not overfull:
            break
        count += 1
    return [share + [[] for _ in range(count - len(share))] for share in bins]


def _lightest_first(rows: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Longest-processing-time rule: each row, longest first, goes to the bin with the fewest tokens."""
    result: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, 0, index) for index in range(bins)]
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        tokens, members, index = heapq.heappop(heap)
        result[index].append(row)
        heapq.heappush(heap, (tokens + lengths[row], members + 1, index))
    return [sorted(rows) for rows in result]


def pack(samples: Sequence[Sample], *, multiple: int = 1, device: torch.device | None = None) -> MicroBatch:
    """Lay samples end to end in one row.

    Args:
        samples: the micro-batch's rollouts; none gives a row of padding that no target reads.
        multiple: pad the row's end to a multiple of this (tensor-parallel size under sequence parallelism).
        device: where the tensors go.
    """
    spans = [(sample.prompt.numel(), sample.response.numel()) for sample in samples]
    starts = [0]
    for prompt, response in spans:
        starts.append(starts[-1] + prompt + response)
    real = starts[-1]
    total = max(multiple, -(-real // multiple) * multiple)
    boundaries = starts + ([total] if total > real else [])

    tokens = torch.zeros(total, dtype=torch.int64)
    positions = torch.zeros(total, dtype=torch.int64)
    for start, end in pairwise(boundaries):
        positions[start:end] = torch.arange(end - start)
    for sample, start in zip(samples, starts, strict=False):
        tokens[start : start + sample.length] = torch.cat([sample.prompt, sample.response])

    predict = [torch.arange(s + p - 1, s + p + r - 1) for (p, r), s in zip(spans, starts, strict=False)]
    segment = [torch.full((r,), index) for index, (_, r) in enumerate(spans)]
    states = [(s + p, s + p + r) for (p, r), s in zip(spans, starts, strict=False)]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return (
            torch.cat(list(parts)).to(device=device, dtype=dtype)
            if parts
            else torch.empty(0, dtype=dtype, device=device)
        )

    return MicroBatch(
        tokens=tokens.to(device),
        positions=positions.to(device),
        boundaries=torch.tensor(boundaries, dtype=torch.int32),
        rows=ints([sample.row for sample in samples]),
        predict=joined(predict, torch.int64),
        targets=joined([sample.response for sample in samples], torch.int64),
        segment=joined(segment, torch.int64),
        state_start=ints([start for start, _ in states]),
        state_end=ints([end for _, end in states]),
        rollout_logprobs=joined([sample.logprobs for sample in samples], torch.float32),
    )
