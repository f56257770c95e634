"""What of a model has changed since it was last sent: found by every rank in its own part, before anything is gathered.

An update changes few of the values that are exported in bf16, because most steps of the fp32 masters are smaller than
half a unit in the last place. A tensor of which a part has changed is sent as three tensors:

    NAME|runs    [numel / 65,536, rounded up] int32, how many of its values have changed in each run of 65,536
    NAME|places  [k] int16, where in their runs the changed values lie, counted from the middle of the run
    NAME|values  [k], the new values, in the exported dtype

A Megatron parameter of which so much has changed that this takes no fewer bytes is sent whole, and one that has not
changed is not sent. The program of the servers that puts the tensors together is serving/engine_extension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.runtime.platform import all_gather
from clipo_megatron.weights.export import Bucket, ExportPlan, Holder, rebuild

RUN = 1 << 16
_PLACE_BYTES = 2
_BITS = {2: torch.int16, 4: torch.int32}  # integers of a dtype's size, by which values are compared: NaN equals NaN

Chunks = Sequence[Mapping[str, Tensor]]


class LastSent:
    """This rank's part of what is exported, as it was when it was last sent: a copy in the exported dtype, on the
    parameters' device.

    Args:
        plan: the export's; the same on every rank.
        holder: this rank, of the first copy of the model (`Holder.exports`).
    """

    def __init__(self, plan: ExportPlan, holder: Holder):
        self.plan, self.holder = plan, holder
        self._parts: dict[int, Tensor] = {}  # by the bucket's number: all its parameters [n], end to end

    def remember(self, chunks: Chunks) -> None:
        """Note that the parameters were sent as they are now."""
        for number, bucket in self._exported():
            self._parts[number] = torch.cat([part.flatten() for part in self._local(bucket, chunks)])

    def changes(self, chunks: Chunks) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield, bucket by bucket, what has changed since the parameters were remembered, and remember them.

        A collective of the ranks that hold a bucket together; the first of them gets the tensors, named as the module
        says, and the others yield nothing. What is gathered is the positions and values of each rank.
        """
        for number, bucket in self._exported():
            local = self._local(bucket, chunks)
            now = torch.cat([part.flatten() for part in local])
            before, self._parts[number] = self._parts[number], now
            found = self._gather(bucket, local, now, _bits(now) != _bits(before))
            if found is not None:
                yield [each for tensor in self._rebuilt(bucket, local, *found) for each in tensor]

    def _exported(self) -> Iterator[tuple[int, Bucket]]:
        return ((number, each) for number, each in enumerate(self.plan.buckets) if self.holder.exports(each))

    def _local(self, bucket: Bucket, chunks: Chunks) -> list[Tensor]:
        parameters = chunks[bucket.chunk]
        found = (parameters[entry.name_in(parameters) or ""] for entry in bucket.entries)
        return [part.detach().to(self.plan.dtype) for part in found]

    def _gather(
        self, bucket: Bucket, local: list[Tensor], now: Tensor, changed: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Which values of each rank have changed [ranks, n], and the values [ranks, n], which mean
        something there alone; None on ranks other than the first."""
        group = self.holder.sharing(bucket)
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        sharded = [entry.sharding.sharded for entry in bucket.entries]
        sizes = torch.tensor([part.numel() for part in local])
        # Of what is the same on all ranks the first one speaks.
        speaks = torch.tensor([[each or not number for each in sharded] for number in range(ranks)])
        views = changed.split(sizes.tolist())
        counts = torch.stack([view.count_nonzero() for view in views]) * speaks[rank].to(now.device)
        everyone = counts.new_empty(ranks * len(views))
        if group is None:
            everyone.copy_(counts)
        else:
            all_gather(everyone, counts, group)
        everyone = everyone.view(ranks, -1).cpu()
        numel = torch.tensor([sum(prod(tensor.shape) for tensor in entry.hf) for entry in bucket.entries])
        size = now.element_size()
        whole = everyone.sum(0) * (_PLACE_BYTES + size) >= numel * size
        for view, all_of_it, mine in zip(views, whole.tolist(), speaks[rank].tolist(), strict=True):
            if not mine or all_of_it:
                view.fill_(mine)
        if group is None:
            return changed[None], now[None]
        places = changed.nonzero().flatten()
        amounts = torch.where(whole, sizes * speaks, everyone).sum(1).tolist()
        most = max(amounts)
        mine = torch.zeros(most * (4 + size), dtype=torch.uint8, device=now.device)
        mine[: 4 * len(places)] = _bytes(places.to(torch.int32))
        mine[4 * most : 4 * most + size * len(places)] = _bytes(now[places])
        received = [torch.empty_like(mine) for _ in range(ranks)] if rank == 0 else None
        if most:
            dist.gather(mine, received, group=group, group_dst=0)
        if received is None:
            return None
        mask, values = changed.new_zeros(ranks, now.numel()), now.new_zeros(ranks, now.numel())
        for each, amount in enumerate(amounts if most else ()):
            theirs = received[each][: 4 * amount].view(torch.int32).long()
            mask[each, theirs] = True
            values[each, theirs] = received[each][4 * most : 4 * most + size * amount].view(now.dtype)
        return mask, values

    def _rebuilt(
        self, bucket: Bucket, local: list[Tensor], mask: Tensor, values: Tensor
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """What to send of each tensor that has changed."""
        sizes = [part.numel() for part in local]
        full = {}
        for kind in (mask, values):
            shards = [
                (part if entry.sharding.sharded else part[:1]).unflatten(1, like.shape)
                for part, like, entry in zip(kind.split(sizes, dim=1), local, bucket.entries, strict=True)
            ]
            full[kind.dtype] = torch.empty(bucket.numel, dtype=kind.dtype, device=kind.device)
            rebuild(bucket, shards, full[kind.dtype])
        for (name, which), (_, tensor) in zip(
            bucket.views(full[mask.dtype]), bucket.views(full[values.dtype]), strict=True
        ):
            places = which.flatten().nonzero().flatten()
            if len(places) == tensor.numel():
                yield [(name, tensor)]
            elif len(places):
                yield sparse(name, places, tensor.flatten()[places], tensor.numel())


def sparse(name: str, places: Tensor, values: Tensor, numel: int) -> list[tuple[str, Tensor]]:
    """The three tensors that say which values of a tensor of `numel` have changed, at places [k] in order."""
    runs = torch.bincount(places // RUN, minlength=-(-numel // RUN))
    within = places % RUN - RUN // 2
    return [
        (f"{name}|runs", runs.to(torch.int32)),
        (f"{name}|places", within.to(torch.int16)),
        (f"{name}|values", values),
    ]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
