"""Which rank sends how many requests, and which of the finished groups train: the same on every rank."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence


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


def fill_batches(
    open_by: Sequence[Mapping[int, int]], targets: Mapping[int, Sequence[int]]
) -> tuple[list[Counter[int]], list[tuple[int, int]]]:
    """Which batches open requests belong to, and which new prompts are needed, where steps run ahead.

    Each batch takes the oldest requests that no earlier batch has taken, and is filled up with new prompts.

    Args:
        open_by: for each rank, step -> how many of its requests are open for that step's batch.
        targets: step -> how many requests each rank is to have for its batch.

    Returns:
        For each rank, step -> how many of its open requests, in order of age, now belong to the step's batch; and step
        and rank of each new prompt, in order.
    """
    left, taken = [Counter(each) for each in open_by], [Counter[int]() for _ in open_by]
    new: list[tuple[int, int]] = []
    for step, wanted in sorted(targets.items()):
        for rank, target in enumerate(wanted):
            for batch in sorted(left[rank]):
                count = min(left[rank][batch], target - taken[rank][step])
                left[rank][batch] -= count
                taken[rank][step] += count
        room = [target - taken[rank][step] for rank, target in enumerate(wanted)]
        new += [(step, rank) for rank in assign_in_turn(room)]
    beyond = max(targets) + 1
    for rank, rest in enumerate(left):
        taken[rank][beyond] += rest.total()
    return taken, new


def can_wait(due: Iterable[int], *, step: int, quota: int) -> bool:
    """Whether requests can all train in time if, after `step`, each step trains `quota` of them.

    Args:
        due: the step of each by which it has to train; what is due by `step` cannot wait.
    """
    return all(place < quota * (last - step) for place, last in enumerate(sorted(due)))
