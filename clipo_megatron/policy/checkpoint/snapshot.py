"""The state of a model in training at one moment, which any thread can write in Megatron's torch_dist format.

Megatron decides which rank writes which part of which tensor. That never changes, so `SnapshotPlan` asks it once. Of
the optimizer's state each data-parallel rank holds a run of every tensor's elements; it writes that run, cut into
boxes. The parts are copied into one buffer in host memory, which the next snapshot reuses, or written from where they
are. The folder has the files that Megatron reads:

    .metadata          where each part of each tensor lies: file, position, length
    __<rank>_0.distcp  an archive of each part, one after the other
    common.pt          state that is the same on all ranks
    metadata.json      the name of the format
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor

from clipo_megatron.policy.checkpoint.reading import holds_nothing
from clipo_megatron.policy.host_memory import HostBuffer
from clipo_megatron.runtime.durable_files import FolderWriter, StreamedFile
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.formats.archive import write_tensor
from clipo_megatron.weights.formats.torch_dist_writer import FileSpan, metadata_files, torch_save_bytes


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A box of a tensor of the checkpoint, and its elements."""

    key: str
    data: Tensor  # the box, with leading axes of size 1 where the tensor is stacked
    offset: tuple[int, ...]  # of the box in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor
    is_copy: bool = False  # whether nothing else uses the elements' memory


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of Megatron's state dict, and which of its elements this rank has."""

    entry: ShardedTensor | ShardedTensorFactory  # before its factory, if it has one, splits it
    # Elements [start, stop), which no other data-parallel rank has; None: all elements, as the other ranks have.
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class _PlannedPart:
    """A box of a tensor of the checkpoint, and where its elements lie in a tensor on this rank."""

    key: str
    offset: tuple[int, ...]  # of the box in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor
    source: int  # index of the tensor on this rank
    start: int  # the box's first element, counted from the source's first
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class SnapshotPlan:
    """Which parts of its tensors this rank writes; their contents may change from one snapshot to the next.

    Args:
        sources: every tensor of the state.
        sharded: the same tensors, split by their factories, and Megatron's objects.
        common: state that is the same on all ranks.
    """

    def __init__(self, sources: Sequence[SourceTensor], sharded: dict[str, Any], common: dict[str, Any]) -> None:
        self.common = common
        self._parts: list[_PlannedPart] = []
        keys = set()
        for index, source in enumerate(sources):
            entry = source.entry
            for tensor in nested_values({"": entry.build() if isinstance(entry, ShardedTensorFactory) else entry}):
                keys.add(tensor.key)
                if _is_mine(tensor, by_span=source.span is not None):
                    self._parts += _planned(tensor, entry.data, index, source.span)
        if lost := keys ^ {each.key for each in nested_values(sharded) if isinstance(each, ShardedTensor)}:
            raise ValueError(f"{min(lost)} is in only one of the two forms of Megatron's state dict, whole and split")
        mine = [each for each in nested_values(sharded) if isinstance(each, ShardedObject) and _is_mine(each)]
        # Extra states of layers, stored as lists of one; nearly all of them hold nothing.
        no_state = torch_save_bytes([None])
        self.objects = {
            each.unique_key: no_state if holds_nothing(each.data) else torch_save_bytes([each.data]) for each in mine
        }
        # Whether they never change, so that the plan holds for every snapshot.
        self.has_fixed_objects = all(holds_nothing(each.data) for each in mine)

    def parts(self, sources: Sequence[Tensor], are_copies: Sequence[bool]) -> list[TensorPart]:
        """The parts of the planned tensors, as views of these.

        Args:
            sources: the tensors in the plan's order; of a tensor with a span, the elements of the span, flat.
            are_copies: for each, whether nothing else uses its memory.
        """
        return [
            TensorPart(
                each.key,
                (whole := sources[each.source]).as_strided(
                    each.sizes, each.strides, whole.storage_offset() + each.start
                ),
                each.offset,
                each.shape,
                are_copies[each.source],
            )
            for each in self._parts
        ]


class TrainableSnapshot:
    """This rank's parts of a model's state in training. No method is collective.

    Args:
        parts: views of the tensors in training, or copies.
        objects: what else this rank writes, by key.
        common: state that is the same on all ranks.
        buffer: the memory that `copy` copies into.
    """

    def __init__(
        self, parts: list[TensorPart], objects: dict[str, bytes], common: dict[str, Any], buffer: HostBuffer
    ) -> None:
        self._parts, self._objects, self._common, self._buffer = parts, objects, torch_save_bytes(common), buffer
        self._since, self._rank = platform().now(), dist.get_rank()

    def copy(self) -> None:
        """Copy the parts to host memory, in any thread, over the copies of the snapshot before."""
        shared = [part for part in self._parts if not part.is_copy]
        with platform().copying(self._since):
            copies = iter(self._buffer.copies([part.data for part in shared]))
        self._parts = [part if part.is_copy else replace(part, data=next(copies), is_copy=True) for part in self._parts]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(part.data.nbytes for part in self._parts)

    def write(self, files: FolderWriter) -> list[FileSpan]:
        """Write this rank's file; returns where in it each part and object lies."""
        if not self._parts and not self._objects:
            return []
        name = f"__{self._rank}_0.distcp"
        with files.open(name) as file:
            return list(self._write(file, name))

    def finish(self, files: FolderWriter, written: Sequence[list[FileSpan]]) -> None:
        """Write the files that describe the others; one rank does, with what `write` returned on every rank."""
        places = [place for spans in written for place in spans]
        for name, data in metadata_files(places, self._common).items():
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
    """Cut the elements of a tensor that lie at [low, high) of memory into boxes, in the order of memory.

    The tensor begins at `start`, and its strides fall, so that no row begins within another.

    Yields:
        Offset and sizes of each box: at most 2n - 1 boxes of a tensor with n axes.
    """
    if 0 in sizes or low >= high:
        return
    if not sizes:
        if low <= start < high:
            yield (), ()
        return
    (rows, *rest), (stride, *inner) = sizes, strides
    reach = 1 + sum((size - 1) * step for size, step in zip(rest, inner, strict=True))  # from a row's start to its end
    stride = max(stride, reach)  # the stride of a single row may be anything

    def some_of(row: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        if 0 <= row < rows:
            for offset, box in boxes(start + row * stride, tuple(rest), tuple(inner), low, high):
                yield (row, *offset), (1, *box)

    # Rows first .. behind - 1 lie in the range as a whole; their neighbours, or a single row, may lie in it in part.
    first, behind = max(0, -(-(low - start) // stride)), min(rows, (high - reach - start) // stride + 1)
    yield from some_of(first - 1)
    if first < behind:
        yield (first, *(0,) * len(rest)), (behind - first, *rest)
    if first <= behind:
        yield from some_of(behind)


def _planned(tensor: ShardedTensor, whole: Tensor, source: int, span: tuple[int, int] | None) -> Iterator[_PlannedPart]:
    """The boxes of one tensor of the checkpoint that this rank writes, out of a tensor `whole` that it is a view of."""
    data = tensor.data.view((1,) * tensor.prepend_axis_num + tuple(tensor.local_shape))
    if data.untyped_storage()._cdata != whole.untyped_storage()._cdata or not whole.is_contiguous():
        raise ValueError(f"{tensor.key} is not a view of the contiguous tensor that it was split from")
    start, strides = data.storage_offset() - whole.storage_offset(), tuple(data.stride())
    everything = [((0,) * data.dim(), tuple(data.shape))]
    low, high = span or (0, whole.numel())
    for offset, sizes in boxes(start, tuple(data.shape), strides, low, high) if span else everything:
        yield _PlannedPart(
            tensor.key,
            tuple(at + more for at, more in zip(tensor.global_offset, offset, strict=True)),
            tuple(tensor.global_shape),
            source,
            start + sum(at * step for at, step in zip(offset, strides, strict=True)) - low,
            sizes,
            strides,
        )


def _is_mine(each: ShardedTensor | ShardedObject, *, by_span: bool = False) -> bool:
    """Whether this rank writes it: alone among its copies, or `by_span` together with other data-parallel ranks."""
    # A replica_id has the pipeline, tensor- and data-parallel number of a copy, in this order.
    return is_main_replica(each.replica_id[:-1] if by_span else each.replica_id)
