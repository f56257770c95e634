"""Which rank trains which rollout in which micro-batch, and how rollouts are packed. Pure functions of lengths."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from clipo_megatron.flow import MicroBatch, Sample, Segment

# Of so many rollouts of a group, those that fill a micro-batch best are found exactly.
_CANDIDATES = 32
# A micro-batch that lacks less than this share of its tokens is filled no further: another prompt would cost more.
_FULL = 1 / 64
# How often the average prompt is computed again for each further micro-batch: guesses, of which the first that fits is
# taken.
_REPEATS = (1.0, 1.5, 2.0)


@dataclass(slots=True)
class _Group:
    """Rollouts that share a prompt, ascending by length, as (length, row)."""

    prompt: int  # its tokens
    rollouts: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.prompt + sum(length for length, _ in self.rollouts)


@lru_cache(maxsize=64)
def plan_micro_batches(
    group: tuple[int, ...],
    prompt_length: tuple[int, ...],
    response_length: tuple[int, ...],
    *,
    ranks: int,
    max_tokens: int,
    share_prompts: bool,
) -> list[list[list[int]]]:
    """Divide the rollouts of a mini-batch among data-parallel ranks and micro-batches.

    The number of micro-batches is the least with which the packed tokens fit, and all of them are filled alike: groups
    are cut where one micro-batch is full and the next begins, which then computes the prompt again. So ranks differ
    little, too.

    Invariants: every row appears once; every rank has the same number of micro-batches, and none is without rollouts
    if there are as many as ranks; a micro-batch exceeds `max_tokens` only if a single rollout does.

    Args:
        group: the group of each rollout.
        prompt_length, response_length: the tokens of each rollout.
        ranks: the data-parallel size.
        max_tokens: the most packed tokens of one micro-batch.
        share_prompts: whether the prompt of a group is packed once in each micro-batch.

    Returns:
        plan[rank][micro_batch] = rows, ascending. It is kept for the next call with the same arguments.
    """
    groups: dict[int, _Group] = {}
    for row, (number, prompt, response) in enumerate(zip(group, prompt_length, response_length, strict=True)):
        if share_prompts:
            groups.setdefault(number, _Group(prompt)).rollouts.append((response, row))
        else:
            groups.setdefault(0, _Group(0)).rollouts.append((prompt + response, row))
    count = max(1, -(-sum(each.tokens for each in groups.values()) // (ranks * max_tokens)))
    while True:
        for repeats in _REPEATS:
            bins = _filled(groups.values(), ranks * count, max_tokens, repeats)
            if bins is not None:
                shares = _spread(bins, ranks, count)
                return [[*map(sorted, each), *([] for _ in range(count - len(each)))] for each in shares]
        count += 1


def _filled(
    groups: Iterable[_Group], count: int, max_tokens: int, repeats: float
) -> list[tuple[int, list[int]]] | None:
    """Fill up to `count` micro-batches one after the other; returns tokens and rows of each, None if they do not fit.

    Each is filled to the average of what is left, from one group after the other.
    """
    queue = [_Group(each.prompt, sorted(each.rollouts)) for each in groups]
    left, tokens = sum(len(each.rollouts) for each in queue), sum(each.tokens for each in queue)
    again = repeats * sum(each.prompt for each in queue) / max(1, len(queue))
    bins: list[tuple[int, list[int]]] = []
    for after in reversed(range(count)):
        if tokens > (after + 1) * max_tokens and left > after + 1:
            return None
        target = min(max_tokens, int((tokens + again * min(after, left)) / (after + 1)) + 1)
        load, rows = 0, []
        for current in queue:
            begun, enough = False, target * (1 - _FULL)
            while current.rollouts and left > after and (load <= enough or not rows):
                before = load if begun else load + current.prompt
                chosen = _closest(current.rollouts, target - before, max_tokens - before, needed=not rows)
                for each in chosen[: left - after]:
                    del current.rollouts[bisect_left(current.rollouts, each)]
                    before, tokens, left = before + each[0], tokens - each[0], left - 1
                    rows.append(each[1])
                if not chosen:
                    break
                load, begun = before, True
            if begun and not current.rollouts:
                tokens -= current.prompt
        if load > max_tokens and len(rows) > 1:
            return None
        bins.append((load, rows))
        queue = [each for each in queue if each.rollouts]
    return None if queue else bins


def _closest(rollouts: Sequence[tuple[int, int]], room: int, most: int, *, needed: bool) -> list[tuple[int, int]]:
    """Choose rollouts of together about `room` tokens, long ones first, and at most `most`.

    If they are `needed`, one is chosen though it may be longer.
    """
    step = max(1.0, len(rollouts) / _CANDIDATES)
    candidates = [rollouts[-1 - int(place * step)] for place in range(min(len(rollouts), _CANDIDATES))]
    if sum(length for length, _ in candidates) <= room:
        return candidates
    # Bit n of reach[i] says whether some of the first i candidates have n tokens together.
    reach = [1]
    for length, _ in candidates:
        reach.append(reach[-1] | reach[-1] << length)
    room = max(room, 0)
    best = (reach[-1] & ((2 << room) - 1)).bit_length() - 1
    if above := reach[-1] >> (room + 1):
        least = room + (above & -above).bit_length()
        if (needed and not best) or least <= min(most, 2 * room - best - 1):
            best = least
    chosen = []
    for each, without in zip(reversed(candidates), reversed(reach[:-1]), strict=True):
        if not without >> best & 1:
            chosen.append(each)
            best -= each[0]
    return chosen


def _spread(bins: Sequence[tuple[int, list[int]]], ranks: int, count: int) -> list[list[list[int]]]:
    """Give micro-batches to ranks, the largest first to the rank that holds least, and at most `count` to each."""
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    heap = [(0, 0, rank) for rank in range(ranks)]
    for load, rows in sorted(bins, key=lambda each: (-each[0], each[1])):
        held, size, rank = heapq.heappop(heap)
        shares[rank].append(rows)
        if size + 1 < count:
            heapq.heappush(heap, (held + load, size + 1, rank))
    return shares


def pack(
    samples: Sequence[Sample], *, share_prompts: bool = False, multiple: int = 1, device: torch.device | None = None
) -> MicroBatch:
    """Pack rollouts end to end in one row.

    Args:
        samples: the micro-batch's rollouts in the order of their rows; without any the row is padding alone.
        share_prompts: whether neighbours of one group share their prompt. All prompts are packed first, each once, and
            all responses behind them.
        multiple: the row is padded to a multiple of this, so that ranks can divide it (`Layout.row_multiple`).
        device: the device of the tensors; None: the CPU.
    """
    tokens: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    segments: list[Segment] = []
    predict: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    routes: list[torch.Tensor] = []
    end = 0

    def append(piece: torch.Tensor, first_position: int, context: tuple[int, int] = (0, 0)) -> int:
        nonlocal end
        start, end = end, end + piece.numel()
        tokens.append(piece)
        positions.append(torch.arange(first_position, first_position + piece.numel()))
        segments.append(Segment(start, piece.numel(), *context))
        return start

    prompts: list[int] = []  # where the prompt of each sample begins
    if share_prompts:  # attention wants all prompts before all responses
        for before, sample in zip([None, *samples], samples, strict=False):
            shared = before is not None and before.group == sample.group
            prompts.append(prompts[-1] if shared else append(sample.prompt, 0))
            if sample.routes is not None and not shared:
                routes.append(sample.routes[: sample.prompt.numel()])
    for number, sample in enumerate(samples):
        length, count = sample.prompt.numel(), sample.response.numel()
        if share_prompts:
            start = append(sample.response, length, (prompts[number], length))
        else:
            prompts.append(append(torch.cat([sample.prompt, sample.response]), 0))
            start = prompts[number] + length
        if sample.routes is not None:
            routes.append(sample.routes[length:] if share_prompts else sample.routes)
        place = torch.arange(start, start + count)
        states.append(place)
        predict.append(torch.cat([torch.tensor([prompts[number] + length - 1]), place[:-1]]))

    padding = max(multiple, -(-end // multiple) * multiple) - end
    if padding:
        append(torch.zeros(padding, dtype=torch.int64), 0)
    counts = torch.tensor([sample.response.numel() for sample in samples], dtype=torch.int64)

    def joined(parts: Sequence[torch.Tensor], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.cat([torch.empty(0, dtype=dtype), *parts]).to(device=device, dtype=dtype)

    return MicroBatch(
        tokens=joined(tokens),
        positions=joined(positions),
        segments=tuple(segments),
        samples=tuple(samples),
        rows=joined([torch.tensor([sample.row for sample in samples], dtype=torch.int64)]),
        predict=joined(predict),
        states=joined(states),
        targets=joined([sample.response for sample in samples]),
        rollout=torch.repeat_interleave(torch.arange(len(samples)), counts).to(device),
        rollout_logprobs=joined([sample.logprobs for sample in samples], torch.float32),
        support=torch.cat([sample.support for sample in samples])
        if samples and samples[0].support is not None
        else None,
        routes=torch.nn.functional.pad(torch.cat(routes), (0, 0, 0, 0, 0, padding), value=-1) if routes else None,
        padding=padding,
    )
