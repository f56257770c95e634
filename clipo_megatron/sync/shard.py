"""The part of the policy that one trainer rank holds, and the order in which the parts are sent."""

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
    """One rank's part of the policy, and its rank in the default process group."""

    spec: ModelSpec
    division: ParallelDivision
    holder: Holder
    chunks: Callable[[], Sequence[Mapping[str, Tensor]]]  # this rank's current parameters, a mapping per model chunk
    dtype: torch.dtype  # dtype of exported tensors
    rank: int  # global rank; 0 is the coordinator

    @classmethod
    def of(cls, actor: Any) -> Shard:
        """The shard that a rank's actor (a `PolicyActor`) holds."""
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
        """Whether this is the one rank that talks to servers during an update."""
        return self.rank == 0

    @property
    def takes_part(self) -> bool:
        """Whether this rank holds part of the first copy of the model, which is the one that is exported."""
        return self.holder.copy == 0 or (self.spec.experts is not None and self.holder.expert_copy == 0)

    @property
    def is_sender(self) -> bool:
        """Whether this rank sends buckets: it is the first of a stage, or of the ranks with the same experts."""
        holder = self.holder
        first_of_experts = holder.expert_copy == 0 and holder.at.etp_rank == 0 and self.spec.experts is not None
        return first_of_experts or (holder.copy == 0 and holder.at.tp_rank == 0)

    @property
    def sender(self) -> tuple[int, int]:
        """Pipeline rank and EP rank, which identify a sender; see `Bucket.sender`."""
        return self.holder.pp_rank, self.holder.at.ep_rank if self.spec.experts else 0

    @property
    def gathers(self) -> bool:
        """Whether buckets are gathered from several ranks."""
        return self.division.tp > 1 or (self.spec.experts is not None and self.division.expert_tp > 1)

    def plan(self, bucket_bytes: int) -> ExportPlan:
        """Plan buckets such that a sender with two of them in flight holds at most twice `bucket_bytes`.

        With TP a sender also holds its own part and all gathered parts of a bucket, so buckets are smaller. A parameter
        that is larger than a bucket is sent alone and may exceed the limit.
        """
        held = 3.0 + 1.0 / max(self.division.tp, self.division.expert_tp) if self.gathers else 2.0
        return plan_export(self.spec, self.division, dtype=self.dtype, bucket_bytes=int(bucket_bytes * 2.0 / held))

    def own_buckets(self, plan: ExportPlan, buffer: Callable[[int], Tensor]) -> Iterator[tuple[Bucket, Tensor]]:
        """See `weights.export.own_buckets`; called on every rank that takes part."""
        return own_buckets(plan, self.chunks(), self.holder, buffer=buffer)

    def largest(self, plan: ExportPlan) -> int:
        """The number of elements of the largest bucket that this rank sends; 0 if it sends none."""
        return max((bucket.numel for bucket in plan.buckets if bucket.sender == self.sender), default=0)

    @property
    def device(self) -> torch.device:
        return next(iter(self.chunks()[0].values())).device


def send_order(plan: ExportPlan) -> list[Bucket]:
    """All buckets in the order in which every server receives them: the stages alternate.

    While one stage's bucket is on the wire, the next stage gathers its own. Within a stage the plan's order is kept: a
    sender may have to help gather another sender's bucket, and must not wait for a server that waits for that bucket.
    """
    stages = range(plan.division.pp)
    waiting = [deque(bucket for bucket in plan.buckets if bucket.owner == owner) for owner in stages]
    order: list[Bucket] = []
    while any(waiting):
        order += [queue.popleft() for queue in waiting if queue]
    return order
