"""What one trainer rank holds of the policy, in the terms of the weight sync."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.weights.export import Bucket, ExportPlan, own_buckets, plan_export
from clipo_megatron.weights.mapping import Stage
from clipo_megatron.weights.spec import ModelSpec


@dataclass(frozen=True)
class Shard:
    """One rank's part of the policy, and its place among the ranks of the default process group."""

    spec: ModelSpec
    stages: Sequence[Stage]  # of the whole model
    chunks: Callable[[], Sequence[Mapping[str, Tensor]]]  # this rank's parameters now, one mapping a model chunk
    dtype: torch.dtype  # of exported tensors
    rank: int  # global; 0 coordinates
    tp: int
    pp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup | None  # None where tp is 1

    @classmethod
    def of(cls, actor: Any) -> Shard:
        """From a `PolicyActor`."""
        layout = actor.layout
        return cls(
            spec=actor.spec,
            stages=actor.stages,
            chunks=lambda: [dict(actor.stage.named_parameters())],
            dtype=actor.export_plan.dtype,
            rank=layout.rank,
            tp=layout.tp,
            pp=layout.pp,
            tp_rank=layout.tp_rank,
            pp_rank=layout.pp_rank,
            dp_rank=layout.dp_rank,
            tp_group=layout.tp_group if layout.tp > 1 else None,
        )

    @property
    def is_coordinator(self) -> bool:
        """The one rank that talks to servers during an update."""
        return self.rank == 0

    @property
    def takes_part(self) -> bool:
        """Whether this rank's replica is the one that is exported."""
        return self.dp_rank == 0

    @property
    def is_sender(self) -> bool:
        """Whether buckets leave the trainer from this rank: the first of its stage."""
        return self.takes_part and self.tp_rank == 0

    def plan(self, bucket_bytes: int) -> ExportPlan:
        """Buckets such that a sender with two of them in flight holds no more than twice `bucket_bytes`.

        With TP a sender also holds its own part and everybody's parts of the bucket that it gathers, so buckets are
        smaller there. A parameter larger than that travels alone, and is then what is held.
        """
        held = 2.0 if self.tp == 1 else 3.0 + 1.0 / self.tp
        return plan_export(
            self.spec,
            self.stages,
            tp_size=self.tp,
            pp_size=self.pp,
            dtype=self.dtype,
            bucket_bytes=int(bucket_bytes * 2.0 / held),
        )

    def own_buckets(self, plan: ExportPlan, buffer: Callable[[int], Tensor]) -> Iterator[tuple[Bucket, Tensor]]:
        """See `weights.export.own_buckets`; every rank of this stage, in the exported replica, calls it."""
        return own_buckets(plan, self.chunks(), pp_rank=self.pp_rank, tp_group=self.tp_group, buffer=buffer)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.chunks()[0].values())).device


def send_order(plan: ExportPlan) -> list[Bucket]:
    """All buckets in the one order in which every server takes them: the stages alternate.

    While one stage's bucket is on the wire, the next one's is being gathered.
    """
    waiting = [deque(bucket for bucket in plan.buckets if bucket.owner == owner) for owner in range(len(plan.chunks))]
    order: list[Bucket] = []
    while any(waiting):
        order += [queue.popleft() for queue in waiting if queue]
    return order
