"""What `torch.save` makes of one tensor, looked into without loading it; and checkpoints' metadata, unpickled safely.

A saved tensor is an uncompressed zip archive: data.pkl says dtype, shape and strides, data/0 are the elements.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from clipo_megatron.weights.kinds import Shape

_LOCAL_HEADER = 30  # bytes before the name of a member of a zip archive
_STORAGES: dict[str, torch.dtype | None] = {  # by the name under which torch.save knows a dtype
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": None,  # newer dtypes: told beside it
}
# What a checkpoint's metadata is made of. Pickles can run anything else, so nothing else is let in.
_METADATA_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_METADATA_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


@dataclass(frozen=True, slots=True)
class Elements:
    """A saved tensor; its elements are contiguous."""

    dtype: torch.dtype
    shape: Shape
    start: int  # of the first element, in the file


def find_elements(descriptor: int, start: int, length: int) -> Elements:
    """Where the elements lie of a tensor that was saved at `start` of an open file.

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
    except (KeyError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"no saved tensor ({error!r})") from error
    if not tensor.contiguous or data.file_size < needed or data.compress_type != zipfile.ZIP_STORED:
        raise ValueError("the saved tensor's elements do not lie end to end")
    elements = _contents(descriptor, start, data) + tensor.offset * tensor.dtype.itemsize
    return Elements(tensor.dtype, tensor.shape, elements)


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`; classes that do not belong there become empty shells."""

    def find_class(self, module: str, name: str) -> Any:
        """The classes of metadata, and torch's dtypes."""
        if module in _METADATA_MODULES or (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Shell


class _Shell:
    """In place of an object that nobody here needs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class _Saved:
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
    """Reads the description of a saved tensor, and calls nothing."""

    def persistent_load(self, pid: Any) -> tuple[str, Any]:
        _, stored, key, *_ = pid
        return key, stored

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is in it")


def _describe(
    storage: tuple[str, Any], offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any = None, *_: Any
) -> _Saved:
    key, stored = storage
    return _Saved(key, dtype if isinstance(dtype, torch.dtype) else stored, offset, tuple(shape), tuple(stride))


def _contents(descriptor: int, start: int, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin in the file: behind its header, whose name and padding vary in length."""
    place = start + member.header_offset
    header = os.pread(descriptor, _LOCAL_HEADER, place)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("no saved tensor (a member's header is not there)")
    return place + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _Span(io.RawIOBase):
    """A part of an open file, as a file."""

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
