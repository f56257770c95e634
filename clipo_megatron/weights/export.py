"""Export: from Megatron's shards on many ranks to full Hugging Face tensors, in buckets, while the model is in use.

The plan is computed once and is the same on every rank. A bucket holds parameters of one model chunk: either no experts
at all, or experts of one expert-parallel (EP) rank. The ranks that hold it gather its tensor-parallel (TP) shards,
rebuild the full tensors in one flat buffer, and pass that on to the other EP ranks and pipeline stages (PP). With
`own_buckets` they do not pass it on, but send it elsewhere, for example to rollout servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.runtime.platform import all_gather
from clipo_megatron.weights.coverage import match
from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.families import entries
from clipo_megatron.weights.mapping import WHOLE, Coordinates, HFTensor, MappingEntry, PipelineStage
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec

# Small enough to stay near the caches of a CPU (256 MiB took twice the time over gloo), large enough for NCCL.
BUCKET_BYTES = 64 * 1024**2

Group = dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters of one model chunk that travel together."""

    owner: int  # pipeline rank that has the chunk
    chunk: int  # index of the chunk on that rank; 0 without virtual stages
    entries: tuple[MappingEntry, ...]
    ep_rank: int | None = None  # EP rank that has these experts; None: the parameters belong to no expert

    @property
    def tensors(self) -> tuple[HFTensor, ...]:
        """The full tensors, in the order of the flat buffer."""
        return tuple(tensor for entry in self.entries for tensor in entry.hf)

    @property
    def numel(self) -> int:
        """Number of elements of the flat buffer."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def sender(self) -> tuple[int, int]:
        """Pipeline rank and EP rank that send the bucket out of the trainer."""
        return self.owner, self.ep_rank or 0

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of everything in the flat buffer [numel], in order, without a copy."""
        parts = flat.split([prod(tensor.shape) for tensor in self.tensors])
        for tensor, part in zip(self.tensors, parts, strict=True):
            yield tensor.name, part.view(tensor.shape)


@dataclass(frozen=True, slots=True)
class Holder:
    """One of the ranks that hold the model, with the process groups of its copy of the model.

    A group of one rank may be None. Data parallelism makes copies of the model; the number of copies of the experts may
    differ from that of everything else.
    """

    at: Coordinates = WHOLE
    pp_rank: int = 0
    copy: int = 0  # index of its copy of everything but the experts
    expert_copy: int = 0  # index of its copy of the experts
    tp_group: Group | None = None
    etp_group: Group | None = None  # ranks that divide the same experts
    ep_group: Group | None = None  # ranks that hold the same part of different experts
    pp_group: Group | None = None

    def has(self, bucket: Bucket) -> bool:
        """Tell whether this rank holds a part of the bucket."""
        return self.pp_rank == bucket.owner and bucket.ep_rank in (None, self.at.ep_rank)

    def exports(self, bucket: Bucket) -> bool:
        """Tell whether this rank holds a part of the bucket in the copy of the model that is exported."""
        return self.has(bucket) and not (self.copy if bucket.ep_rank is None else self.expert_copy)

    def sharing(self, bucket: Bucket) -> Group | None:
        """Return the group of ranks that hold the bucket together with this one."""
        return self.tp_group if bucket.ep_rank is None else self.etp_group


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What is exported, in which order and by which ranks."""

    spec: ModelSpec
    division: ParallelDivision
    buckets: tuple[Bucket, ...]
    dtype: torch.dtype  # of every exported tensor

    @property
    def tensors(self) -> tuple[HFTensor, ...]:
        """Everything that an export yields, in order; a tied output layer is left out."""
        return tuple(tensor for bucket in self.buckets for tensor in bucket.tensors)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all exported tensors."""
        return sum(bucket.numel for bucket in self.buckets) * self.dtype.itemsize

    def stages(self, pp_rank: int) -> tuple[PipelineStage, ...]:
        """Return the model chunks of a pipeline rank."""
        return self.division.stages(self.spec.num_layers)[pp_rank :: self.division.pp]


def plan_export(
    spec: ModelSpec, division: ParallelDivision, *, dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES
) -> ExportPlan:
    """Plan the export of a model.

    Chunks follow each other in model order. Within one, the parameters that belong to no expert come first, then the
    experts, buckets of the EP ranks taking turns. A parameter larger than `bucket_bytes` has a bucket of its own.
    """
    limit = bucket_bytes // dtype.itemsize
    buckets: list[Bucket] = []
    for index, stage in enumerate(division.stages(spec.num_layers)):
        owner, chunk = division.owner(index), index // division.pp
        dense = [entry for entry in entries(spec, stage) if not entry.copy and not entry.experts]
        buckets += [Bucket(owner, chunk, part) for part in _split(dense, limit)]
        if spec.experts is None:
            continue
        waiting = []
        for ep_rank in range(division.ep):
            held = entries(spec, stage, Coordinates(ep=division.ep, ep_rank=ep_rank))
            parts = _split([entry for entry in held if entry.experts], limit)
            waiting.append([Bucket(owner, chunk, part, ep_rank) for part in parts])
        buckets += [bucket for turn in zip(*waiting, strict=True) for bucket in turn]  # all hold equally many
    return ExportPlan(spec, division, tuple(buckets), dtype)


def export(
    plan: ExportPlan, chunks: Sequence[Mapping[str, Tensor]], holder: Holder = Holder(), *, to_all: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor of the plan's dtype on the parameters' device), in plan order.

    A collective: all ranks that hold the model call it with the same plan and exhaust the iterator. The tensors of a
    bucket are views of one new buffer, which is freed when the caller has dropped all of them. Waits end with the
    timeout of the groups.

    Peak of extra memory: three buckets (this rank's part, the gathered parts, the result), or one without TP, beside
    the buckets whose tensors the caller still holds.

    Args:
        plan: the same on every rank.
        chunks: this rank's parameters by name, one mapping for each of its model chunks.
        holder: this rank.
        to_all: whether every rank gets the tensors; otherwise only the first rank of a copy of the model (0 in TP, PP,
            EP and ETP) gets them, and the others take part and yield nothing.

    Raises:
        WeightsError: the groups or the number of chunks do not have the plan's sizes.
        CoverageError: the parameters do not match the plan. Both are raised before anything is sent.
    """
    return _tensors(export_buckets(plan, chunks, holder, to_all=to_all))


def _tensors(buckets: Iterator[tuple[Bucket, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    while (item := next(buckets, None)) is not None:
        views = list(item[0].views(item[1]))
        del item  # the views alone keep the buffer alive
        while views:
            yield views.pop(0)


def export_buckets(
    plan: ExportPlan, chunks: Sequence[Mapping[str, Tensor]], holder: Holder = Holder(), *, to_all: bool = True
) -> Iterator[tuple[Bucket, Tensor]]:
    """Yield (bucket, its flat buffer in new memory); everything else is as for `export`."""
    _check_group("pp", holder.pp_group, plan.division.pp)
    if plan.spec.experts is not None:
        _check_group("ep", holder.ep_group, plan.division.ep)
    _check(plan, chunks, holder)
    return _stream(plan, chunks, holder, to_all)


def own_buckets(
    plan: ExportPlan,
    chunks: Sequence[Mapping[str, Tensor]],
    holder: Holder = Holder(),
    *,
    buffer: Callable[[int], Tensor],
) -> Iterator[tuple[Bucket, Tensor]]:
    """Yield (bucket, flat buffer) for the buckets that this rank sends out, in plan order.

    A collective of the ranks that hold a bucket together, in the first copy of the model: the first of them gets the
    bucket, the others take part and yield nothing. All exhaust the iterator; ranks of other copies need not call
    it. Each tensor is sent by one rank; a tied output layer is sent as the embedding.

    Args:
        plan: the same on every rank.
        chunks: this rank's parameters, as for `export`.
        holder: this rank; its PP and EP groups are not used.
        buffer: called with a number of elements when the shards of a bucket have been gathered. Returns a flat tensor
            of at least that size, of the plan's dtype, on the parameters' device, once its memory may be overwritten:
            so it limits the number of buffers in use.

    Memory beside these buffers: none without TP; with TP this rank's part and the gathered parts of one bucket, which
    is 1 + 1/tp buckets.

    Raises:
        WeightsError: a group or the number of chunks does not have the plan's size.
        CoverageError: the parameters do not match the plan. Both are raised before anything is sent.
    """
    _check(plan, chunks, holder)
    return _own(plan, chunks, holder, buffer)


def _own(
    plan: ExportPlan, chunks: Sequence[Mapping[str, Tensor]], holder: Holder, buffer: Callable[[int], Tensor]
) -> Iterator[tuple[Bucket, Tensor]]:
    """Do the work of `own_buckets`, which has checked the arguments before the first bucket is asked for."""
    for bucket in plan.buckets:
        if not holder.exports(bucket):
            continue
        shards = _gather(bucket, chunks[bucket.chunk], plan, holder, to_all=False)
        if shards is not None:
            flat = buffer(bucket.numel)[: bucket.numel]
            rebuild(bucket, shards, flat)
            del shards  # frees them while the caller uses the buffer
            yield bucket, flat


def _check(plan: ExportPlan, chunks: Sequence[Mapping[str, Tensor]], holder: Holder) -> None:
    _check_group("tp", holder.tp_group, plan.division.tp)
    if plan.spec.experts is not None:
        _check_group("etp", holder.etp_group, plan.division.expert_tp)
    stages = plan.stages(holder.pp_rank)
    if len(chunks) != len(stages):
        raise WeightsError(f"the export was planned for {len(stages)} model chunks a rank, not {len(chunks)}")
    for parameters, stage in zip(chunks, stages, strict=True):
        match(parameters, entries(plan.spec, stage, holder.at), holder.at)


def _check_group(name: str, group: Group | None, size: int) -> None:
    ranks = dist.get_world_size(group) if group is not None else 1
    if ranks != size:
        raise WeightsError(f"the export was planned for {name}={size}, and {name}_group has {ranks} ranks")


def _stream(
    plan: ExportPlan, chunks: Sequence[Mapping[str, Tensor]], holder: Holder, to_all: bool
) -> Iterator[tuple[Bucket, Tensor]]:
    """Do the work of `export_buckets`, which has checked the arguments before the first bucket is asked for."""
    device = next(iter(chunks[0].values())).device
    at = holder.at
    leads = to_all or not (at.tp_rank or at.ep_rank or at.etp_rank)  # the same for all ranks of a pipeline
    for bucket in plan.buckets:
        flat: Tensor | None = None  # also frees the buffer of the bucket before
        across_ep = holder.pp_rank == bucket.owner and bucket.ep_rank is not None and holder.ep_group is not None
        if holder.has(bucket):
            shards = _gather(bucket, chunks[bucket.chunk], plan, holder, to_all)
            if shards is not None:
                flat = torch.empty(bucket.numel, dtype=plan.dtype, device=device)
                rebuild(bucket, shards, flat)
                del shards
        elif to_all or (across_ep and not (at.ep_rank or at.etp_rank)) or (leads and holder.pp_rank == 0):
            flat = torch.empty(bucket.numel, dtype=plan.dtype, device=device)
        if across_ep and flat is not None:
            _pass_on(flat, bucket.ep_rank, holder.ep_group, to_all)
        if holder.pp_group is not None and leads and flat is not None:
            _pass_on(flat, bucket.owner, holder.pp_group, to_all)
        if flat is not None and leads and (to_all or holder.pp_rank == 0):
            yield bucket, flat


def _gather(
    bucket: Bucket, parameters: Mapping[str, Tensor], plan: ExportPlan, holder: Holder, to_all: bool
) -> list[Tensor] | None:
    """Gather the ranks' parts of each entry, [ranks, *local shape]; returns None on ranks that get nothing."""
    local = [parameters[entry.name_in(parameters) or ""].detach() for entry in bucket.entries]
    group = holder.sharing(bucket)
    if group is None:
        return [part.unsqueeze(0) for part in local]
    sharded = [part for part, entry in zip(local, bucket.entries, strict=True) if entry.sharding.sharded]
    first = dist.get_rank(group) == 0
    parts: Iterator[Tensor] = iter(())
    if sharded:
        mine = torch.cat([part.to(plan.dtype).flatten() for part in sharded])
        everyone = mine.new_empty(dist.get_world_size(group) if to_all or first else 0, mine.numel())
        # Bytes travel: not every backend knows every dtype.
        if to_all:
            all_gather(_bytes(everyone).view(-1), _bytes(mine), group)
        else:
            dist.gather(_bytes(mine), list(_bytes(everyone)) if first else None, group=group, group_dst=0)
        parts = iter(everyone.split([part.numel() for part in sharded], dim=1))
    if not (to_all or first):
        return None
    return [
        next(parts).unflatten(1, part.shape) if entry.sharding.sharded else part.unsqueeze(0)
        for part, entry in zip(local, bucket.entries, strict=True)
    ]


def rebuild(bucket: Bucket, shards: Sequence[Tensor], flat: Tensor) -> None:
    """Write the full tensors of a bucket, flat [numel], from the ranks' parts of each entry, [ranks, *local shape]."""
    views = [view for _, view in bucket.views(flat)]
    for entry, parts in zip(bucket.entries, shards, strict=True):
        entry.sharding.unshard(parts, views[: len(entry.hf)])
        views = views[len(entry.hf) :]


def _pass_on(flat: Tensor, owner: int, group: Group, to_all: bool) -> None:
    """Send the buffer of rank `owner` of a group to all other ranks, or only to the first one."""
    if to_all:
        dist.broadcast(_bytes(flat), group=group, group_src=owner)
    elif owner != 0 and dist.get_rank(group) == owner:
        dist.send(_bytes(flat), group=group, group_dst=0)
    elif owner != 0 and dist.get_rank(group) == 0:
        dist.recv(_bytes(flat), group=group, group_src=owner)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _split(bound: Sequence[MappingEntry], limit: int) -> Iterator[tuple[MappingEntry, ...]]:
    """Divide entries into runs of at most `limit` elements, or of one entry that is larger."""
    run: list[MappingEntry] = []
    size = 0
    for entry in bound:
        elements = sum(prod(shape) for shape in entry.shapes)
        if run and size + elements > limit:
            yield tuple(run)
            run, size = [], 0
        run.append(entry)
        size += elements
    if run:
        yield tuple(run)
