"""Which rank asks for how many prompts, and which of the finished groups train: the same on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def deal(room: Sequence[int]) -> list[int]:
    """Which asker gets each of the next prompts: in turn, as long as each has room.

    Worked example: room [2, 1, 3] gives [0, 1, 2, 0, 2, 2].
    """
    turns = max([0, *room])
    return [asker for turn in range(turns) for asker in range(len(room)) if turn < room[asker]]


def deal_by_load(load: Sequence[int], count: int, weight: int) -> list[int]:
    """Which asker gets each of the next `count` prompts: the one with the least `load`, to which each adds `weight`.

    Worked example: load [5, 0, 2], weight 4 gives [1, 2, 1, 0].
    """
    heap = [(each, asker) for asker, each in enumerate(load)]
    heapq.heapify(heap)
    owners = []
    for _ in range(count):
        least, asker = heapq.heappop(heap)
        owners.append(asker)
        heapq.heappush(heap, (least + weight, asker))
    return owners


def choose(groups: dict[int, tuple[int, bool]], size: int) -> tuple[dict[int, int], list[int]]:
    """Which of the step's groups train.

    Args:
        groups: ticket -> (rank, whether it teaches).
        size: groups of a batch.

    Returns:
        Positions of the chosen tickets: those that teach first, the rest filled up with others, earlier tickets before
        later ones. And the tickets of groups that teach and were not chosen.
    """
    ranked = sorted(groups, key=lambda request_id: (not groups[request_id][1], request_id))
    chosen = sorted(ranked[:size])
    return (
        {request_id: position for position, request_id in enumerate(chosen)},
        [request_id for request_id in ranked[size:] if groups[request_id][1]],
    )


def oversampled(quota: int, factor: float) -> int:
    """Prompts to ask for when `quota` groups are needed: 10 by 1.1 are 11, though the product is a hair more."""
    return math.ceil(quota * factor - 1e-9)


def share(count: int, rollout_ranks: Sequence[int], rank: int) -> int:
    """How many of `count` prompts a rank asks for when they are dealt out in turn."""
    return len(range(rollout_ranks.index(rank), count, len(rollout_ranks))) if rank in rollout_ranks else 0
