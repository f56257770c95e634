"""Megatron's shards, live on many ranks -> full Hugging Face tensors, in buckets, on every rank or on one a replica.

The plan is computed once and is the same on every rank; `export` then follows it. For each bucket the owning pipeline
stage gathers its tensor-parallel (TP) shards, rebuilds the tensors into one flat buffer, and passes that to the other
pipeline stages (PP). `own_buckets` stops before the last step: each stage keeps what it owns, to send it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.weights.coverage import match
from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.families import entries
from clipo_megatron.weights.mapping import Coordinates, Entry, HFTensor, Stage
from clipo_megatron.weights.spec import ModelSpec

# Small enough to stay near the caches of a CPU (256 MiB took twice the time over gloo), large enough for NCCL.
BUCKET_BYTES = 64 * 1024**2

Group = dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together: parameters of one model chunk."""

    owner: int  # pipeline rank that has the chunk
    chunk: int  # which of its chunks; 0 without virtual stages
    entries: tuple[Entry, ...]

    @property
    def tensors(self) -> tuple[HFTensor, ...]:
        """In the order of the flat buffer."""
        return tuple(tensor for entry in self.entries for tensor in entry.hf)

    @property
    def numel(self) -> int:
        """Elements of the flat buffer."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything in the bucket's flat buffer [numel], in order, without a copy."""
        parts = flat.split([prod(tensor.shape) for tensor in self.tensors])
        for tensor, part in zip(self.tensors, parts, strict=True):
            yield tensor.name, part.view(tensor.shape)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What is exported, in which order and by whom."""

    buckets: tuple[Bucket, ...]
    chunks: tuple[tuple[tuple[Entry, ...], ...], ...]  # entries [pipeline rank][chunk], copies included
    tp_size: int
    dtype: torch.dtype  # of every exported tensor

    @property
    def tensors(self) -> tuple[HFTensor, ...]:
        """Everything that an export yields, in order; a tied output layer is not among it."""
        return tuple(tensor for bucket in self.buckets for tensor in bucket.tensors)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(bucket.numel for bucket in self.buckets) * self.dtype.itemsize


def plan_export(
    spec: ModelSpec,
    stages: Sequence[Stage],
    *,
    tp_size: int,
    dtype: torch.dtype,
    pp_size: int | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> ExportPlan:
    """Plan the export of a model cut into `stages`, listed in model order.

    `pp_size` is the count of stages unless stages are virtual; stage i then belongs to pipeline rank i % pp_size, as
    Megatron interleaves them. A parameter larger than `bucket_bytes` has a bucket of its own.
    """
    ranks = len(stages) if pp_size is None else pp_size
    chunks: list[list[tuple[Entry, ...]]] = [[] for _ in range(ranks)]
    buckets: list[Bucket] = []
    for index, stage in enumerate(stages):
        owner = index % ranks
        bound = entries(spec, stage)
        owned = [entry for entry in bound if not entry.copy]
        for part in _split(owned, bucket_bytes // dtype.itemsize):
            buckets.append(Bucket(owner, len(chunks[owner]), part))
        chunks[owner].append(bound)
    return ExportPlan(tuple(buckets), tuple(map(tuple, chunks)), tp_size, dtype)


def export(
    plan: ExportPlan,
    chunks: Sequence[Mapping[str, Tensor]],
    *,
    tp_group: Group | None = None,
    pp_group: Group | None = None,
    to_all: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor of the plan's dtype on the parameters' device), in plan order.

    A collective: all ranks of both groups call it, with the same plan, and exhaust the iterator; a group may be None
    where it would have one rank. `chunks` are this rank's parameters by name, one mapping a model chunk. The tensors
    are new memory, views of one buffer a bucket: the caller may keep them, and frees a bucket by dropping them.
    With `to_all=False` only the first rank of a model replica (TP 0, PP 0) gets tensors; the others take part and
    yield nothing. Every wait ends with the timeout that the groups were made with.

    Extra memory, at its peak: three buckets (a rank's part, the gathered parts, the result) beside those that the
    caller still holds a tensor of; one bucket without TP. A bucket is `bucket_bytes`, or a larger parameter alone.

    Raises:
        WeightsError: the groups are not of the plan's sizes, or the count of chunks is not the plan's.
        CoverageError: the parameters and the plan do not match. Both are raised before anything is sent.
    """
    buckets = export_buckets(plan, chunks, tp_group=tp_group, pp_group=pp_group, to_all=to_all)
    return _tensors(buckets)


def _tensors(buckets: Iterator[tuple[Bucket, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    while (found := next(buckets, None)) is not None:
        views = list(found[0].views(found[1]))
        del found  # the views alone keep the bucket
        while views:
            yield views.pop(0)


def export_buckets(
    plan: ExportPlan,
    chunks: Sequence[Mapping[str, Tensor]],
    *,
    tp_group: Group | None = None,
    pp_group: Group | None = None,
    to_all: bool = True,
) -> Iterator[tuple[Bucket, Tensor]]:
    """As `export`, but yield (bucket, its flat buffer), new memory each."""
    _check_group("pp", pp_group, len(plan.chunks))
    pp_rank = dist.get_rank(pp_group) if pp_group is not None else 0
    _check(plan, chunks, tp_group, pp_rank)
    return _stream(plan, chunks, tp_group, pp_group, pp_rank, to_all)


def own_buckets(
    plan: ExportPlan,
    chunks: Sequence[Mapping[str, Tensor]],
    *,
    pp_rank: int = 0,
    tp_group: Group | None = None,
    buffer: Callable[[int], Tensor],
) -> Iterator[tuple[Bucket, Tensor]]:
    """Yield (bucket, flat buffer) for the buckets that pipeline rank `pp_rank` owns, in plan order.

    A collective of `tp_group` alone: its first rank gets the buckets, the others take part and yield nothing. All of
    them exhaust the iterator. Each tensor is owned by one stage: a tied output layer is sent with the embedding.

    Args:
        plan: the same on every rank; `chunks` and `tp_group` as for `export`.
        chunks: this rank's parameters.
        pp_rank: this rank's.
        tp_group: this stage's tensor-parallel ranks; None where it would have one.
        buffer: called on the first rank, with a number of elements, when a bucket's shards are gathered and are to be
            written: a flat tensor of at least that size, of the plan's dtype, on the parameters' device. It returns
            when that memory may be overwritten, so it is what holds the sender to its number of buffers.

    Memory beside these buffers: none without TP; with TP this rank's part and the gathered parts of one bucket, that
    is 1 + 1/tp buckets.

    Raises:
        WeightsError: the group is not of the plan's size, or the count of chunks is not the plan's.
        CoverageError: the parameters and the plan do not match. Both are raised before anything is sent.
    """
    _check(plan, chunks, tp_group, pp_rank)
    return _own(plan, chunks, pp_rank, tp_group, buffer)


def _own(
    plan: ExportPlan,
    chunks: Sequence[Mapping[str, Tensor]],
    pp_rank: int,
    tp_group: Group | None,
    buffer: Callable[[int], Tensor],
) -> Iterator[tuple[Bucket, Tensor]]:
    for bucket in plan.buckets:
        if bucket.owner != pp_rank:
            continue
        shards = _gather(bucket, chunks[bucket.chunk], plan, tp_group, to_all=False)
        if shards is not None:
            flat = buffer(bucket.numel)[: bucket.numel]
            _rebuild(bucket, shards, flat)
            del shards  # before the caller keeps us waiting
            yield bucket, flat


def _check(plan: ExportPlan, chunks: Sequence[Mapping[str, Tensor]], tp_group: Group | None, pp_rank: int) -> None:
    _check_group("tp", tp_group, plan.tp_size)
    planned = plan.chunks[pp_rank]
    if len(chunks) != len(planned):
        raise WeightsError(f"the export was planned for {len(planned)} model chunks a rank, not {len(chunks)}")
    for parameters, bound in zip(chunks, planned, strict=True):
        match(parameters, bound, Coordinates(tp=plan.tp_size))


def _check_group(name: str, group: Group | None, size: int) -> None:
    ranks = dist.get_world_size(group) if group is not None else 1
    if ranks != size:
        raise WeightsError(f"the export was planned for {name}={size}, and {name}_group has {ranks} ranks")


def _stream(
    plan: ExportPlan,
    chunks: Sequence[Mapping[str, Tensor]],
    tp_group: Group | None,
    pp_group: Group | None,
    pp_rank: int,
    to_all: bool,
) -> Iterator[tuple[Bucket, Tensor]]:
    device = next(iter(chunks[0].values())).device
    receives = to_all or (pp_rank == 0 and (tp_group is None or dist.get_rank(tp_group) == 0))
    for bucket in plan.buckets:
        flat: Tensor | None = None  # also lets go of the bucket before
        if pp_rank == bucket.owner:
            shards = _gather(bucket, chunks[bucket.chunk], plan, tp_group, to_all)
            if shards is not None:
                flat = torch.empty(bucket.numel, dtype=plan.dtype, device=device)
                _rebuild(bucket, shards, flat)
                del shards
        elif receives:
            flat = torch.empty(bucket.numel, dtype=plan.dtype, device=device)
        if pp_group is not None and flat is not None:
            _pass_on(flat, bucket.owner, pp_group, pp_rank, to_all)
        if receives and flat is not None:
            yield bucket, flat


def _gather(
    bucket: Bucket, parameters: Mapping[str, Tensor], plan: ExportPlan, group: Group | None, to_all: bool
) -> list[Tensor] | None:
    """The TP ranks' parts of each entry, [ranks, *local shape]; None on ranks that are to get nothing."""
    local = [parameters[entry.name_in(parameters) or ""].detach() for entry in bucket.entries]
    if group is None:
        return [part.unsqueeze(0) for part in local]
    sharded = [part for part, entry in zip(local, bucket.entries, strict=True) if entry.kind.sharded]
    first = dist.get_rank(group) == 0
    parts: Iterator[Tensor] = iter(())
    if sharded:
        mine = torch.cat([part.to(plan.dtype).flatten() for part in sharded])
        everyone = mine.new_empty(plan.tp_size if to_all or first else 0, mine.numel())
        # Bytes travel: not every backend knows every dtype.
        if to_all:
            dist.all_gather_single(_bytes(everyone).view(-1), _bytes(mine), group=group)
        else:
            dist.gather(_bytes(mine), list(_bytes(everyone)) if first else None, group=group, group_dst=0)
        parts = iter(everyone.split([part.numel() for part in sharded], dim=1))
    if not (to_all or first):
        return None
    return [
        next(parts).unflatten(1, part.shape) if entry.kind.sharded else part.unsqueeze(0)
        for part, entry in zip(local, bucket.entries, strict=True)
    ]


def _rebuild(bucket: Bucket, shards: Sequence[Tensor], flat: Tensor) -> None:
    views = [view for _, view in bucket.views(flat)]
    for entry, parts in zip(bucket.entries, shards, strict=True):
        entry.kind.unshard(parts, views[: len(entry.hf)])
        views = views[len(entry.hf) :]


def _pass_on(flat: Tensor, owner: int, group: Group, pp_rank: int, to_all: bool) -> None:
    """Bring the owner's buffer to the other pipeline ranks, or to the first alone."""
    if to_all:
        dist.broadcast(_bytes(flat), group=group, group_src=owner)
    elif owner != 0 and pp_rank == owner:
        dist.send(_bytes(flat), group=group, group_dst=0)
    elif owner != 0:
        dist.recv(_bytes(flat), group=group, group_src=owner)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _split(bound: Sequence[Entry], limit: int) -> Iterator[tuple[Entry, ...]]:
    """Runs of entries of at most `limit` elements each, or of one entry."""
    run: list[Entry] = []
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
