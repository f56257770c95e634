"""The policy's state as it was at one moment, written as torch_dist by whoever has the time.

Megatron says which rank keeps which part of which tensor. The parts are copied to host memory, all into one buffer that
is kept for the next time, or written from where they are. The format is the one that Megatron reads:

    .metadata          which part of which tensor lies where in which file
    __<rank>_0.distcp  an archive of each part, one after the other
    common.pt          what is the same on all ranks
    metadata.json      the name of the format
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from torch import Tensor

from clipo_megatron.device import platform
from clipo_megatron.files import FolderWriter, StreamedFile
from clipo_megatron.weights.archive import write_tensor
from clipo_megatron.weights.torch_dist_writer import Place, description, saved

_ALIGNMENT = 64  # bytes, of the parts in the buffer


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor of the checkpoint."""

    key: str
    data: Tensor  # of the size of the part, with leading axes of size 1 where the tensor is stacked
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole tensor


class HostBuffer:
    """Host memory that copies are made to; grows when it has to, and never shrinks."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy of each tensor. Copies made before are overwritten."""
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
        platform().synchronize()
        return made


class PolicySnapshot:
    """This rank's parts of the policy's state. Nothing here is collective.

    Args:
        sharded: Megatron's state dict of sharded tensors and objects, factories applied.
        common: what is the same on all ranks.
        buffer: to copy tensors into; None: they are written from where they are, before anything changes them.
    """

    def __init__(self, sharded: dict[str, Any], common: dict[str, Any], buffer: HostBuffer | None) -> None:
        mine = [each for each in nested_values(sharded) if is_main_replica(each.replica_id)]
        parts = [_part(each) for each in mine if isinstance(each, ShardedTensor)]
        if buffer is not None:
            copies = buffer.copies([part.data for part in parts])
            parts = [Part(part.key, copy, part.offset, part.shape) for part, copy in zip(parts, copies, strict=True)]
        self._parts = parts
        # Small states of layers, which are stored as lists.
        nothing = saved([None])  # what nearly all of them are
        self._objects = {
            each.unique_key: nothing if each.data is None else saved([each.data])
            for each in mine
            if isinstance(each, ShardedObject)
        }
        self._common = saved(common)
        self._rank = dist.get_rank()

    @property
    def nbytes(self) -> int:
        """Of this rank's tensors."""
        return sum(part.data.nbytes for part in self._parts)

    def write(self, files: FolderWriter) -> list[Place]:
        """Write this rank's file; returns where everything is."""
        if not self._parts and not self._objects:
            return []
        name = f"__{self._rank}_0.distcp"
        with files.open(name) as file:
            return list(self._write(file, name))

    def finish(self, files: FolderWriter, written: Sequence[list[Place]]) -> None:
        """Write the files that describe the others; on one rank."""
        places = [place for part in written for place in part]
        for name, data in description(places, self._common).items():
            files.write(name, data)

    def _write(self, file: StreamedFile, name: str) -> Iterator[Place]:
        for part in self._parts:
            data, start = part.data.cpu().contiguous(), file.nbytes
            write_tensor(data, file)
            yield Place(
                part.key, name, start, file.nbytes - start, part.offset, tuple(data.shape), part.shape, data.dtype
            )
        for key, data in self._objects.items():
            start = file.nbytes
            file.write(data)
            yield Place(key, name, start, len(data))


def _part(tensor: ShardedTensor) -> Part:
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    data = tensor.data.detach().view(sizes)
    return Part(tensor.key, data, tuple(tensor.global_offset), tuple(tensor.global_shape))
