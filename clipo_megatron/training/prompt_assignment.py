"""Which rank sends how many requests, and which of the finished groups train: the same on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def assign_in_turn(room: Sequence[int]) -> list[int]:
    """The rank of each of the next prompts: in turn, as long as a rank has room.

    Worked example: room [2, 1, 3] gives [0, 1, 2, 0, 2, 2].
    """
    turns = max([0, *room])
    return [rank for turn in range(turns) for rank in range(len(room)) if turn < room[rank]]


def assign_by_load(load: Sequence[int], count: int, weight: int) -> list[int]:
    """The rank of each of the next `count` prompts: the one with the least `load`, to which each prompt adds `weight`.

    Worked example: load [5, 0, 2], weight 4 gives [1, 2, 1, 0].
    """
    heap = [(each, rank) for rank, each in enumerate(load)]
    heapq.heapify(heap)
    ranks = []
    for _ in range(count):
        least, rank = heapq.heappop(heap)
        ranks.append(rank)
        heapq.heappush(heap, (least + weight, rank))
    return ranks


def select_groups(groups: dict[int, tuple[int, bool]], size: int) -> tuple[dict[int, int], list[int]]:
    """Which of the step's groups train.

    Args:
        groups: request id -> (rank that has the group, whether it counts: in dynamic sampling, whether its rewards
            vary).
        size: groups of a batch.

    Returns:
        Positions in the batch by request id: groups that count come first, the batch is filled up with others, and
        lower request ids precede higher ones. And the request ids of groups that count and were not selected.
    """
    ranked = sorted(groups, key=lambda request_id: (not groups[request_id][1], request_id))
    selected = sorted(ranked[:size])
    return (
        {request_id: position for position, request_id in enumerate(selected)},
        [request_id for request_id in ranked[size:] if groups[request_id][1]],
    )


def oversampled(quota: int, factor: float) -> int:
    """The number of prompts to request when `quota` groups are needed, free of rounding errors: 10 by 1.1 gives 11."""
    return math.ceil(quota * factor - 1e-9)


def share(count: int, rollout_ranks: Sequence[int], rank: int) -> int:
    """How many of `count` prompts a rank gets when they are assigned in turn."""
    return len(range(rollout_ranks.index(rank), count, len(rollout_ranks))) if rank in rollout_ranks else 0
