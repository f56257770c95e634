"""Decisions of an update: ranks report what happened to rank 0, the coordinator, whose decision all ranks follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class SyncError(RuntimeError):
    """No server has the new weights; the message says what happened to each server."""


def share(decide: Callable[[], T]) -> T:
    """Return the coordinator's decision on every rank; collective.

    Raises:
        SyncError: on every rank, because `decide` raised on the coordinator.
    """
    box: list[Any] = [None, ""]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = decide()
        except Exception as error:
            cause, box[1] = error, f"rank 0: {type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise SyncError(f"the update of the servers failed: {box[1]}") from cause
    return box[0]


def gather(mine: T) -> list[T]:
    """Return the values of all ranks, in order, on the coordinator and [] elsewhere; collective."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    return everyone or []
