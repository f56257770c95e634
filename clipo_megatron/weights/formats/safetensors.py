"""The safetensors format, read and written without mapping files into memory.

    8 bytes, little endian: length of the header | header: JSON, padded with spaces | tensors, end to end

The safetensors library maps files, whose pages count as memory of the process, writes whole files at a time, and does
not give a header's text, without which a file cannot be made again byte for byte. Here tensors are read with `pread`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.formats.header import LENGTH_BYTES, Header, StoredTensor, kind_of, parse_header
from clipo_megatron.weights.sharding import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Header", "SafetensorsFile", "SlicedRead", "StoredTensor", "as_bytes", "build_header", "parse_header"]

_LONGEST_HEADER = 100_000_000  # the format's own limit
_LARGEST_READ = 1 << 30  # of one system call


def build_header(tensors: Iterable[tuple[str, torch.dtype, Shape]]) -> Header:
    """Make a header as the safetensors library does: sorted by falling size of the dtype, then by name."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        nbytes = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kind_of(dtype), "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return parse_header(text + " " * (-len(text.encode()) % 8))


class SafetensorsFile:
    """An open file and its header. Several threads may read at a time.

    Raises:
        WeightsFolderError: the file is damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, rows: slice = slice(None), *, into: Tensor | None = None) -> Tensor:
        """Read neighbouring rows of a tensor, or all of a scalar, into new memory or `into`."""
        stored = self.header.tensors[name]
        if not stored.shape:
            shape, start = stored.shape, stored.start
        else:
            first, last, _ = rows.indices(stored.shape[0])
            shape = (max(last - first, 0), *stored.shape[1:])
            start = stored.start + first * prod(stored.shape[1:]) * stored.itemsize
        import torch  # here, so that reading headers needs no torch

        target = torch.empty(shape, dtype=stored.dtype) if into is None else into.view(shape)
        read_exactly(self._file.fileno(), target, start, self.path)
        return target

    def read_bytes(self, name: str, start: int, count: int) -> bytes:
        """Read `count` bytes of a tensor from its byte `start` on, or fewer at its end."""
        stored = self.header.tensors[name]
        return os.pread(self._file.fileno(), max(min(count, stored.nbytes - start), 0), stored.start + start)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        self._file.close()

    def _read_header(self) -> Header:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(os.pread(self._file.fileno(), LENGTH_BYTES, 0), "little")
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, _LONGEST_HEADER):
            raise WeightsFolderError(f"{self.path} is damaged or truncated: it ends within its header")
        try:
            text = os.pread(self._file.fileno(), length, LENGTH_BYTES).decode()
        except UnicodeDecodeError as error:
            raise WeightsFolderError(f"{self.path} is damaged or truncated: {error}") from error
        header = parse_header(text, self.path)
        if header.size != size:
            raise WeightsFolderError(
                f"{self.path} is damaged or truncated: it has {size} bytes, its header says {header.size}"
            )
        return header


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def read_exactly(descriptor: int, target: Tensor, offset: int, path: object) -> None:
    """Fill a contiguous tensor with the bytes from `offset` on; `path` names the file in messages.

    Raises:
        WeightsFolderError: the file ends too early.
    """
    if not target.numel():
        return
    buffer = as_bytes(target)
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done : done + _LARGEST_READ]], offset + done)
        if not count:
            raise WeightsFolderError(f"{path} is damaged or truncated: it ends at byte {offset + done}")
        done += count


class SlicedRead:
    """A tensor on disk that is indexed as in memory; subclasses read whole rows."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape: Shape = tuple(shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Read rows start .. stop-1 into new memory."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """Read a tensor without dimensions."""
        raise NotImplementedError

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        if not self.shape:
            return self.whole()
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, slice) or first.step not in (None, 1):
            raise TypeError(f"tensors on disk are indexed by runs of rows, not by {first!r}")
        start, stop, _ = first.indices(self.shape[0])
        part = self.rows(start, max(start, stop))
        return part[(slice(None), *rest)] if rest else part
