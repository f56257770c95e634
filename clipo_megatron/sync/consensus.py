"""How the ranks of an update agree: rank 0, the coordinator, decides; the others tell it what they did, and obey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class SyncError(RuntimeError):
    """No server has the new weights; the message says what happened to each."""


def share(decide: Callable[[], T]) -> T:
    """The coordinator's decision, on every rank. If it cannot decide, nobody goes on. Collective.

    Raises:
        SyncError: deciding raised, on the coordinator.
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
    """Everybody's, in order of rank, on the coordinator; [] elsewhere. Collective."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    return everyone or []
