"""The archive that `torch.save` makes of one tensor: written in one pass, and located without loading it.

It is an uncompressed zip archive: data.pkl describes dtype, shape and strides, data/0 holds the elements.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.runtime.durable_files import StreamedFile
from clipo_megatron.weights.formats.safetensors import as_bytes
from clipo_megatron.weights.sharding import Shape

_LOCAL_HEADER = 30  # bytes before the name of a member of a zip archive
_STORAGES: dict[str, torch.dtype | None] = {  # dtypes by the names of torch.save
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": None,  # newer dtypes, which are named separately
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items() if dtype is not None}
_ALIGNMENT = 64  # of the elements' offset in the archive, in bytes
_SIZES_FOLLOW, _UTF8 = 0x0008, 0x0800  # zip's flags: checksum and size follow the member; its name is UTF-8
_LARGEST = 0xFFFF0000  # bytes of an archive without 64-bit fields


@dataclass(frozen=True, slots=True)
class Elements:
    """Where the contiguous elements of a saved tensor lie."""

    dtype: torch.dtype
    shape: Shape
    start: int  # offset of the first element in the file


def write_tensor(tensor: Tensor, file: StreamedFile) -> None:
    """Append a contiguous tensor on the CPU in the format of `torch.save`, for `torch.load` and `find_elements`.

    Takes 60% of the processor time of `torch.save` (docs/performance.md): each byte is read once, for the checksum of
    the file and that of the archive.
    """
    if tensor.dtype not in _STORAGE_NAMES or tensor.nbytes >= _LARGEST:
        torch.save(tensor.clone(), file)  # a clone, because all memory that a view shares would be written
        return
    archive = _Archive(file)
    archive.add("data.pkl", _description(tensor))
    archive.add("byteorder", b"little")
    archive.add("data/0", as_bytes(tensor) if tensor.numel() else b"")
    archive.add("version", b"3\n")
    archive.end()


class _Archive:
    """Writes a zip archive of uncompressed members as torch lays them out."""

    def __init__(self, file: StreamedFile) -> None:
        self._file, self._start, self._directory, self._count = file, file.nbytes, b"", 0

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Write a member with aligned data."""
        path, begin = f"archive/{name}".encode(), self._file.nbytes - self._start
        padding = -(begin + _LOCAL_HEADER + len(path) + 4) % _ALIGNMENT
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        header = struct.pack("<5H3I2H", 0, _SIZES_FOLLOW | _UTF8, 0, 0, 0, 0, 0, 0, len(path), len(extra))
        self._file.append(b"PK\x03\x04" + header + path + extra)
        sums = struct.pack("<3I", self._file.append(data), len(data), len(data))
        self._file.append(b"PK\x07\x08" + sums)
        entry = struct.pack("<6H", 0, 0, _SIZES_FOLLOW | _UTF8, 0, 0, 0) + sums
        entry += struct.pack("<5H2I", len(path), 0, 0, 0, 0, 0, begin)
        self._directory, self._count = self._directory + b"PK\x01\x02" + entry + path, self._count + 1

    def end(self) -> None:
        """Write the archive's directory, which ends it."""
        begin = self._file.nbytes - self._start
        sizes = struct.pack("<4H2IH", 0, 0, self._count, self._count, len(self._directory), begin, 0)
        self._file.append(self._directory + b"PK\x05\x06" + sizes)


def _description(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=2).dump(_Description(tensor))
    return buffer.getvalue()


class _Description:
    """Pickles as the call that makes a tensor of its storage, as torch.save writes it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = self._tensor
        storage = _Storage(_STORAGE_NAMES[tensor.dtype], tensor.numel())
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, stride, False, OrderedDict())


@dataclass(frozen=True, slots=True)
class _Storage:
    """Stands for a torch storage while a tensor's description is pickled."""

    kind: str
    numel: int


class _TensorPickler(pickle.Pickler):
    """Pickles the description of a tensor whose elements are in data/0."""

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        return ("storage", getattr(torch, obj.kind), "0", "cpu", obj.numel) if isinstance(obj, _Storage) else None


def find_elements(descriptor: int, start: int, length: int) -> Elements:
    """Find the elements of the tensor that was saved in `length` bytes from `start` of an open file.

    Raises:
        ValueError: there is no saved tensor, or its elements are not contiguous.
    """
    try:
        archive = zipfile.ZipFile(_Span(descriptor, start, length))
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        pickled = members["data.pkl"]
        text = os.pread(descriptor, pickled.file_size, _contents(descriptor, start, pickled))
        tensor = _TensorUnpickler(io.BytesIO(text)).load()
        if not isinstance(tensor, _Saved):
            raise ValueError("it is not a tensor")
        data = members[f"data/{tensor.storage}"]
        needed = (tensor.offset + prod(tensor.shape)) * tensor.dtype.itemsize
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception, even MemoryError
        raise ValueError(f"no saved tensor ({error!r})") from error
    if not tensor.contiguous or data.file_size < needed or data.compress_type != zipfile.ZIP_STORED:
        raise ValueError("the saved tensor's elements do not lie end to end")
    elements = _contents(descriptor, start, data) + tensor.offset * tensor.dtype.itemsize
    return Elements(tensor.dtype, tensor.shape, elements)


@dataclass(frozen=True, slots=True)
class _Saved:
    """The description of a saved tensor: sizes, strides and offset count elements of its storage."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: Shape
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of a saved tensor without calling what it names."""

    def persistent_load(self, pid: Any) -> tuple[str, Any]:
        _, stored, key, *_ = pid
        return key, stored

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return self.describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is in it")

    def describe(self, storage: tuple[str, Any], offset: int, shape: Any, stride: Any, *others: Any) -> _Saved:
        """What the call in the pickle would make a tensor of. A method, whose attributes a pickle cannot set."""
        key, stored = storage
        dtype = next((each for each in others[2:3] if isinstance(each, torch.dtype)), stored)
        return _Saved(key, dtype, offset, tuple(shape), tuple(stride))


def _contents(descriptor: int, start: int, member: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin in the file: after its header, which varies in length."""
    place = start + member.header_offset
    header = os.pread(descriptor, _LOCAL_HEADER, place)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("no saved tensor (a member's header is not there)")
    return place + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _Span(io.RawIOBase):
    """A part of an open file, which can be read as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        found = os.pread(self._descriptor, left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(found)
        return found
