"""The policy's state as it was at one moment, written as torch_dist by whoever has the time.

Megatron says which rank keeps which part of which tensor; that stays, so it is asked once (`SnapshotPlan`). Where
data-parallel ranks hold a stretch of elements each, as of an optimizer's state, every rank keeps its own, as
boxes. The parts are copied to host memory, all into one buffer that is kept for the next time, or written from where
they are. The format is the one that Megatron reads:

    .metadata          which part of which tensor lies where in which file
    __<rank>_0.distcp  an archive of each part, one after the other
    common.pt          what is the same on all ranks
    metadata.json      the name of the format
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor

from clipo_megatron.runtime.durable_files import FolderWriter, StreamedFile
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.formats.archive import write_tensor
from clipo_megatron.weights.formats.torch_dist_writer import FileSpan, description, saved

_ALIGNMENT = 64  # bytes, of the parts in the buffer


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A part of a tensor of the checkpoint."""

    key: str
    data: Tensor  # of the size of the part, with leading axes of size 1 where the tensor is stacked
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole tensor
    fresh: bool = False  # whether the tensor is the snapshot's alone


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of Megatron's state dict and how much of it this rank has."""

    entry: ShardedTensor | ShardedTensorFactory  # not yet split by its factory, if it has one
    span: tuple[int, int] | None = (
        None  # elements [start, stop), which no other data-parallel rank has; None: all of it
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    """Where a part's elements lie in the tensor that they are a part of here."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    source: int
    start: int  # elements behind the source's first
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class SnapshotPlan:
    """Which parts of which of this rank's tensors it writes, whatever they hold at that time.

    Args:
        wholes: every tensor.
        sharded: the same, split by factories, and Megatron's objects.
        common: what is the same on all ranks.
    """

    def __init__(self, wholes: Sequence[Whole], sharded: dict[str, Any], common: dict[str, Any]) -> None:
        self.common = common
        self._parts: list[_Planned] = []
        keys = set()
        for source, whole in enumerate(wholes):
            entry = whole.entry
            for tensor in nested_values({"": entry.build() if isinstance(entry, ShardedTensorFactory) else entry}):
                keys.add(tensor.key)
                if _is_mine(tensor, by_span=whole.span is not None):
                    self._parts += _planned(tensor, entry.data, source, whole.span)
        if lost := keys ^ {each.key for each in nested_values(sharded) if isinstance(each, ShardedTensor)}:
            raise ValueError(f"{min(lost)} is in one of two forms of Megatron's state dict only")
        mine = [each for each in nested_values(sharded) if isinstance(each, ShardedObject) and _is_mine(each)]
        # Small states of layers, which are stored as lists; nearly all of them are nothing.
        nothing = saved([None])
        self.objects = {each.unique_key: nothing if each.data is None else saved([each.data]) for each in mine}
        self.lasts = all(each.data is None for each in mine)

    def parts(self, sources: Sequence[Tensor], fresh: Sequence[bool]) -> list[TensorPart]:
        """The parts of the tensors that the plan was made for, as they are now.

        Args:
            sources: the tensors in the plan's order; of those with a span, the span alone, flat.
            fresh: whether each is the snapshot's alone.
        """
        return [
            TensorPart(
                each.key,
                (whole := sources[each.source]).as_strided(
                    each.sizes, each.strides, whole.storage_offset() + each.start
                ),
                each.offset,
                each.shape,
                fresh[each.source],
            )
            for each in self._parts
        ]


class HostBuffer:
    """Host memory that copies are made to; grows when it has to, and never shrinks."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy of each tensor, under way on a GPU. Copies made before are overwritten."""
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # first let go of the old one
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=platform().has_gpu)
        made = []
        for tensor, start in zip(tensors, starts, strict=True):
            place = self._bytes[start : start + tensor.nbytes]
            made.append(place.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True))
        return made


class TrainableSnapshot:
    """This rank's parts of the policy's state. Nothing here is collective.

    Args:
        parts: where they are now.
        objects: what else is written, by key.
        common: what is the same on all ranks.
        buffer: that `copy` copies into.
    """

    def __init__(
        self, parts: list[TensorPart], objects: dict[str, bytes], common: dict[str, Any], buffer: HostBuffer
    ) -> None:
        self._parts, self._objects, self._common, self._buffer = parts, objects, saved(common), buffer
        self._since, self._rank = platform().now(), dist.get_rank()

    def copy(self) -> None:
        """Copy to host memory, in any thread; what was copied for the snapshot before is overwritten."""
        shared = [part for part in self._parts if not part.fresh]
        with platform().copying(self._since):
            copies = iter(self._buffer.copies([part.data for part in shared]))
        self._parts = [part if part.fresh else replace(part, data=next(copies), fresh=True) for part in self._parts]

    @property
    def nbytes(self) -> int:
        """Of this rank's tensors."""
        return sum(part.data.nbytes for part in self._parts)

    def write(self, files: FolderWriter) -> list[FileSpan]:
        """Write this rank's file; returns where everything is."""
        if not self._parts and not self._objects:
            return []
        name = f"__{self._rank}_0.distcp"
        with files.open(name) as file:
            return list(self._write(file, name))

    def finish(self, files: FolderWriter, written: Sequence[list[FileSpan]]) -> None:
        """Write the files that describe the others; on one rank."""
        places = [place for part in written for place in part]
        for name, data in description(places, self._common).items():
            files.write(name, data)

    def _write(self, file: StreamedFile, name: str) -> Iterator[FileSpan]:
        for part in self._parts:
            data, start = part.data.cpu().contiguous(), file.nbytes
            write_tensor(data, file)
            yield FileSpan(
                part.key, name, start, file.nbytes - start, part.offset, tuple(data.shape), part.shape, data.dtype
            )
        for key, data in self._objects.items():
            start = file.nbytes
            file.write(data)
            yield FileSpan(key, name, start, len(data))


def boxes(
    start: int, sizes: tuple[int, ...], strides: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What of a tensor lies at [low, high) of memory: offset and sizes of boxes, at most 2n - 1 of n axes, in order.

    The tensor begins at `start`, and its strides fall, so that none of its rows begins within another.
    """
    if 0 in sizes or low >= high:
        return
    if not sizes:
        if low <= start < high:
            yield (), ()
        return
    (rows, *rest), (stride, *inner) = sizes, strides
    reach = 1 + sum((size - 1) * step for size, step in zip(rest, inner, strict=True))  # of a row
    stride = max(stride, reach)  # that of a single row says nothing

    def some_of(row: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        if 0 <= row < rows:
            for offset, box in boxes(start + row * stride, tuple(rest), tuple(inner), low, high):
                yield (row, *offset), (1, *box)

    # Rows first .. behind - 1 are there as a whole; of their neighbours, or of one row alone, there may be a part.
    first, behind = max(0, -(-(low - start) // stride)), min(rows, (high - reach - start) // stride + 1)
    yield from some_of(first - 1)
    if first < behind:
        yield (first, *(0,) * len(rest)), (behind - first, *rest)
    if first <= behind:
        yield from some_of(behind)


def _planned(tensor: ShardedTensor, whole: Tensor, source: int, span: tuple[int, int] | None) -> Iterator[_Planned]:
    data = tensor.data.view((1,) * tensor.prepend_axis_num + tuple(tensor.local_shape))
    if data.untyped_storage()._cdata != whole.untyped_storage()._cdata or not whole.is_contiguous():
        raise ValueError(f"{tensor.key} is no view of a contiguous tensor")
    start, strides = data.storage_offset() - whole.storage_offset(), tuple(data.stride())
    everything = [((0,) * data.dim(), tuple(data.shape))]
    low, high = span or (0, whole.numel())
    for offset, sizes in boxes(start, tuple(data.shape), strides, low, high) if span else everything:
        yield _Planned(
            tensor.key,
            tuple(at + more for at, more in zip(tensor.global_offset, offset, strict=True)),
            tuple(tensor.global_shape),
            source,
            start + sum(at * step for at, step in zip(offset, strides, strict=True)) - low,
            sizes,
            strides,
        )


def _is_mine(each: ShardedTensor | ShardedObject, *, by_span: bool = False) -> bool:
    """Whether this rank is the one that writes it; or one of those that write it together, each its span."""
    # Copies are numbered by pipeline, tensor- and data-parallel rank, in this order.
    return is_main_replica(each.replica_id[:-1] if by_span else each.replica_id)
