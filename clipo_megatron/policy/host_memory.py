"""Host memory for tensors that leave the device, or are copied from it; page-locked on a GPU, else copies are slow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clipo_megatron.runtime.platform import platform

_ALIGNMENT = 64  # bytes, of the parts in the buffer


class HostBuffer:
    """Host memory for copies of tensors, reused from one time to the next. It grows as needed and never shrinks."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy each tensor, overwriting earlier copies. On a GPU the copies are still under way on return."""
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # frees the old buffer first
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=platform().has_gpu)
        made = []
        for tensor, start in zip(tensors, starts, strict=True):
            place = self._bytes[start : start + tensor.nbytes]
            made.append(place.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True))
        return made


class HostedTensors:
    """Takes the memory of tensors from the device, and gives it back; the tensors and all views of them stay valid."""

    def __init__(self) -> None:
        self._buffer = HostBuffer()
        self._taken: list[tuple[Tensor, Tensor]] = []  # bytes of a storage, which has no memory, and their copy

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Copy the storages of these tensors to the host and free them; once, until they are given back."""
        if self._taken:
            return
        found = {each._cdata: each for each in (tensor.untyped_storage() for tensor in tensors)}.values()
        # On a CPU, memory that a checkpoint was written from, through numpy, cannot be freed.
        storages = [each for each in found if each.resizable()]
        device = platform().device
        bytes_of = [torch.empty(0, dtype=torch.uint8, device=device).set_(storage) for storage in storages]
        self._taken = list(zip(bytes_of, self._buffer.copies(bytes_of), strict=True))
        platform().synchronize()
        for storage in storages:
            storage.resize_(0)

    def give_back(self) -> None:
        """Undo `take`; does nothing if nothing is taken."""
        for held, copy in self._taken:
            held.untyped_storage().resize_(copy.numel())
            held.copy_(copy, non_blocking=True)
        platform().synchronize()
        self._taken = []
