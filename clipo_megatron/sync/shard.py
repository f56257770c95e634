"""What one trainer rank holds of the policy, in the terms of the weight sync."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.weights.export import Bucket, ExportPlan, Holder, own_buckets, plan_export
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec


@dataclass(frozen=True)
class Shard:
    """One rank's part of the policy, and its place among the ranks of the default process group."""

    spec: ModelSpec
    division: ParallelDivision
    holder: Holder
    chunks: Callable[[], Sequence[Mapping[str, Tensor]]]  # this rank's parameters now, one mapping a model chunk
    dtype: torch.dtype  # of exported tensors
    rank: int  # global; 0 coordinates

    @classmethod
    def of(cls, actor: Any) -> Shard:
        """From a `Policy`."""
        return cls(
            spec=actor.spec,
            division=actor.layout.division,
            holder=actor.layout.holder,
            chunks=lambda: [dict(actor.stage.named_parameters())],
            dtype=actor.export_plan.dtype,
            rank=actor.layout.rank,
        )

    @property
    def is_coordinator(self) -> bool:
        """The one rank that talks to servers during an update."""
        return self.rank == 0

    @property
    def takes_part(self) -> bool:
        """Whether this rank holds something of the copy of the model that is exported, the first."""
        return self.holder.copy == 0 or (self.spec.experts is not None and self.holder.expert_copy == 0)

    @property
    def is_sender(self) -> bool:
        """Whether buckets leave the trainer from this rank: the first of a stage, or of those with the same experts."""
        holder = self.holder
        first_of_experts = holder.expert_copy == 0 and holder.at.etp_rank == 0 and self.spec.experts is not None
        return first_of_experts or (holder.copy == 0 and holder.at.tp_rank == 0)

    @property
    def sender(self) -> tuple[int, int]:
        """Pipeline rank and EP rank, which no two senders share; see `Bucket.sender`."""
        return self.holder.pp_rank, self.holder.at.ep_rank if self.spec.experts else 0

    @property
    def gathers(self) -> bool:
        """Whether buckets are put together from several ranks' parts."""
        return self.division.tp > 1 or (self.spec.experts is not None and self.division.expert_tp > 1)

    def plan(self, bucket_bytes: int) -> ExportPlan:
        """Buckets such that a sender with two of them in flight holds no more than twice `bucket_bytes`.

        With TP a sender also holds its own part and everybody's parts of the bucket that it gathers, so buckets are
        smaller there. A parameter larger than that travels alone, and is then what is held.
        """
        held = 3.0 + 1.0 / max(self.division.tp, self.division.expert_tp) if self.gathers else 2.0
        return plan_export(self.spec, self.division, dtype=self.dtype, bucket_bytes=int(bucket_bytes * 2.0 / held))

    def own_buckets(self, plan: ExportPlan, buffer: Callable[[int], Tensor]) -> Iterator[tuple[Bucket, Tensor]]:
        """See `weights.export.own_buckets`; every rank that takes part calls it."""
        return own_buckets(plan, self.chunks(), self.holder, buffer=buffer)

    def largest(self, plan: ExportPlan) -> int:
        """Elements of the largest bucket that leaves from this rank; 0 where none does."""
        return max((bucket.numel for bucket in plan.buckets if bucket.sender == self.sender), default=0)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.chunks()[0].values())).device


def send_order(plan: ExportPlan) -> list[Bucket]:
    """All buckets in the one order in which every server takes them: the stages alternate.

    While one stage's bucket is on the wire, the next one's is being gathered. Within a stage it is the plan's order: a
    sender may be needed to gather what another sends, and must not wait for a server that waits for that.
    """
    stages = range(plan.division.pp)
    waiting = [deque(bucket for bucket in plan.buckets if bucket.owner == owner) for owner in stages]
    order: list[Bucket] = []
    while any(waiting):
        order += [queue.popleft() for queue in waiting if queue]
    return order
