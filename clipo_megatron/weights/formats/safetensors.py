"""The safetensors format, read and written without mapping files into memory.

    8 bytes, little endian: length of the header | header: JSON, padded with spaces | tensors, end to end

The safetensors library maps files, whose pages count as memory of the process, writes whole files at a time, and does
not give a header's text, without which a file cannot be made again byte for byte. Here tensors are read with `pread`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.sharding import Shape

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the format's own limit
_LARGEST_READ = 1 << 30  # of one system call


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: Shape
    start: int  # offset of its bytes in the file

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file. The same text with the same tensors is the same file."""

    text: str
    tensors: Mapping[str, StoredTensor] = field(repr=False)  # in the order of their bytes
    size: int  # of the whole file, in bytes

    @property
    def start(self) -> int:
        """Offset of the first tensor's bytes."""
        return _LENGTH + len(self.text.encode())

    @property
    def bytes(self) -> bytes:
        """All bytes before the tensors."""
        raw = self.text.encode()
        return len(raw).to_bytes(_LENGTH, "little") + raw


def parse_header(text: str, source: object = "the header") -> Header:
    """Parse a header's text; `source` names it in messages.

    Raises:
        WeightsFolderError: it is not a header, or its tensors do not lie end to end.
    """
    try:
        entries: dict[str, Any] = json.loads(text)
        start = _LENGTH + len(text.encode())
        tensors, end = {}, 0
        for name, entry in sorted(
            ((name, entry) for name, entry in entries.items() if name != "__metadata__"),
            key=lambda item: item[1]["data_offsets"],
        ):
            stored = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
            if entry["data_offsets"] != [end, end + stored.nbytes]:
                raise WeightsFolderError(f"{source} is damaged or truncated: the bytes of {name} are misplaced")
            tensors[name], end = stored, end + stored.nbytes
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, WeightsFolderError):
            raise
        raise WeightsFolderError(f"{source} is damaged or truncated: no safetensors header ({error!r})") from error
    return Header(text, tensors, start + end)


def build_header(tensors: Iterable[tuple[str, torch.dtype, Shape]]) -> Header:
    """Make a header as the safetensors library does: sorted by falling size of the dtype, then by name."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        nbytes = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
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
            start = stored.start + first * prod(stored.shape[1:]) * stored.dtype.itemsize
        target = torch.empty(shape, dtype=stored.dtype) if into is None else into.view(shape)
        read_exactly(self._file.fileno(), target, start, self.path)
        return target

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        self._file.close()

    def _read_header(self) -> Header:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(os.pread(self._file.fileno(), _LENGTH, 0), "little")
        if size < _LENGTH or length > min(size - _LENGTH, _LONGEST_HEADER):
            raise WeightsFolderError(f"{self.path} is damaged or truncated: it ends within its header")
        try:
            text = os.pread(self._file.fileno(), length, _LENGTH).decode()
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
