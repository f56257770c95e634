"""Which rank trains which rollout in which micro-batch, and how rollouts are packed. Pure functions of lengths."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipo_megatron.flow import MicroBatch, Sample, Segment

# Groups are cut into parts until the busiest rank has at most this many times the mean number of tokens.
BALANCE = 1.02


@dataclass(frozen=True, slots=True)
class PackingUnit:
    """Rollouts that stay in one micro-batch: some that share a prompt, or a single one."""

    rows: tuple[int, ...]
    tokens: int


def units_of(
    group: Sequence[int],
    prompt_length: Sequence[int],
    response_length: Sequence[int],
    *,
    ranks: int,
    max_tokens: int,
    share_prompts: bool,
) -> list[PackingUnit]:
    """Divide the rollouts of a mini-batch into packing units.

    Without shared prompts each rollout is a unit. With them a unit is a group or a part of one: groups are cut where
    they do not fit `max_tokens`, and into as few parts as balance the ranks, for each part computes the prompt again.

    Args:
        group: the group of each rollout.
        prompt_length, response_length: the tokens of each rollout.
        ranks: the data-parallel size.
        max_tokens: the most packed tokens of one micro-batch.
        share_prompts: whether the prompt of a unit is packed once.
    """
    if not share_prompts:
        return [
            PackingUnit((row,), p + r) for row, (p, r) in enumerate(zip(prompt_length, response_length, strict=True))
        ]
    members: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(group):
        members[number].append(row)

    best, least = [], math.inf
    for parts in range(1, 1 + max(map(len, members.values()))):
        units = [
            unit
            for rows in members.values()
            for unit in _parts_of(
                rows, prompt_length[rows[0]], [response_length[row] for row in rows], parts, max_tokens
            )
        ]
        tokens = [unit.tokens for unit in units]
        heaviest = max(sum(tokens[i] for i in share) for share in _lightest_first(range(len(units)), tokens, ranks))
        if not best or len(best) < ranks or heaviest < least:
            best, least = units, heaviest
        if len(units) >= ranks and heaviest * ranks <= BALANCE * sum(tokens):
            break
    return best


def _parts_of(
    rows: Sequence[int], prompt: int, responses: Sequence[int], parts: int, max_tokens: int
) -> list[PackingUnit]:
    """Cut a group into at least `parts` parts, and into so many that each fits `max_tokens` or is one rollout."""
    size = dict(zip(rows, responses, strict=True))
    for count in range(min(parts, len(rows)), len(rows) + 1):
        bins = _lightest_first(rows, responses, count)
        units = [PackingUnit(tuple(part), prompt + sum(size[row] for row in part)) for part in bins]
        if all(len(unit.rows) == 1 or unit.tokens <= max_tokens for unit in units):
            break
    return units


def plan_micro_batches(units: Sequence[PackingUnit], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Divide units among data-parallel ranks and micro-batches.

    Invariants: every row appears once; every rank has the same number of micro-batches; a micro-batch exceeds
    `max_tokens` only if a single unit does. Ranks are balanced by tokens (the largest unit first, to the rank with the
    fewest), and so are the micro-batches of a rank.

    Returns:
        plan[rank][micro_batch] = rows, ascending.

    Raises:
        ValueError: fewer units than ranks.
    """
    if len(units) < ranks:
        raise ValueError(
            f"{len(units)} rollouts cannot keep {ranks} data-parallel ranks busy; raise data.prompts_per_step or "
            "rollout.samples_per_prompt, or lower algorithm.mini_batches or layout.dp"
        )
    tokens = [unit.tokens for unit in units]
    shares = _lightest_first(range(len(units)), tokens, ranks)
    count = max(1, max(-(-sum(tokens[i] for i in share) // max_tokens) for share in shares))
    while True:
        bins = [_lightest_first(share, [tokens[i] for i in share], min(count, len(share))) for share in shares]
        if all(len(part) == 1 or sum(tokens[i] for i in part) <= max_tokens for each in bins for part in each):
            break
        count += 1
    rows = [[sorted(row for i in part for row in units[i].rows) for part in each] for each in bins]
    return [each + [[] for _ in range(count - len(each))] for each in rows]


def _lightest_first(items: Sequence[int], sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Longest-processing-time rule: items go, the largest first, to the bin that holds least."""
    result: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, 0, index) for index in range(bins)]
    for size, item in sorted(zip(sizes, items, strict=True), key=lambda pair: (-pair[0], pair[1])):
        held, members, index = heapq.heappop(heap)
        result[index].append(item)
        heapq.heappush(heap, (held + size, members + 1, index))
    return [sorted(part) for part in result]


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
    for number, sample in enumerate(samples):
        length, count = sample.prompt.numel(), sample.response.numel()
        if share_prompts:
            start = append(sample.response, length, (prompts[number], length))
        else:
            prompts.append(append(torch.cat([sample.prompt, sample.response]), 0))
            start = prompts[number] + length
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
        padding=padding,
    )
