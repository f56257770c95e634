"""The headers of safetensors files: names, element types, shapes and places of tensors. Imports no torch.

Whether a folder's tensors fit its config.json can so be told from the first bytes of each file, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.sharding import Shape

if TYPE_CHECKING:
    import torch

# The format's element types: bytes of one element, and the name that torch has for it.
KINDS: dict[str, tuple[int, str]] = {
    "BF16": (2, "bfloat16"),
    "F16": (2, "float16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
LENGTH_BYTES = 8  # before the header, which say how long it is


@cache
def dtype_of(kind: str) -> torch.dtype:
    """Return torch's name for an element type of the format."""
    import torch

    return getattr(torch, KINDS[kind][1])


@cache
def kind_of(dtype: torch.dtype) -> str:
    """Return the format's name for a dtype; a KeyError if the format has none."""
    return {dtype_of(kind): kind for kind in KINDS}[dtype]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    kind: str  # the element type, a key of KINDS
    shape: Shape
    start: int  # offset of its bytes in the file

    @property
    def dtype(self) -> torch.dtype:
        """The element type as torch names it."""
        return dtype_of(self.kind)

    @property
    def itemsize(self) -> int:
        """Size of one element in bytes."""
        return KINDS[self.kind][0]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file. The same text with the same tensors is the same file."""

    text: str
    tensors: Mapping[str, StoredTensor] = field(repr=False)  # in the order of their bytes
    size: int  # of the whole file, in bytes

    @property
    def start(self) -> int:
        """Offset of the first tensor's bytes."""
        return LENGTH_BYTES + len(self.text.encode())

    @property
    def bytes(self) -> bytes:
        """All bytes before the tensors."""
        raw = self.text.encode()
        return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def parse_header(text: str, source: object = "the header") -> Header:
    """Parse a header's text; `source` names it in messages.

    Raises:
        WeightsFolderError: it is not a header, its tensors do not lie end to end, or an element type is unknown.
    """
    try:
        entries: dict[str, Any] = json.loads(text)
        start = LENGTH_BYTES + len(text.encode())
        tensors, end = {}, 0
        for name, entry in sorted(
            ((name, entry) for name, entry in entries.items() if name != "__metadata__"),
            key=lambda item: item[1]["data_offsets"],
        ):
            if entry["dtype"] not in KINDS:
                raise WeightsFolderError(
                    f"{source}: {name} has the element type {entry['dtype']!r}, and known are {', '.join(KINDS)}. "
                    "Save the model with torch_dtype bfloat16 or float32"
                )
            if not all(type(size) is int and size >= 0 for size in (*entry["shape"], *entry["data_offsets"])):
                raise WeightsFolderError(f"{source} is damaged: {name} has no shape or place of whole numbers")
            stored = StoredTensor(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            if entry["data_offsets"] != [end, end + stored.nbytes]:
                raise WeightsFolderError(f"{source} is damaged or truncated: the bytes of {name} are misplaced")
            tensors[name], end = stored, end + stored.nbytes
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, WeightsFolderError):
            raise
        raise WeightsFolderError(f"{source} is damaged or truncated: no safetensors header ({error!r})") from error
    return Header(text, tensors, start + end)
