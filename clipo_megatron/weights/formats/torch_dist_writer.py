"""Writes what describes a torch_dist folder: which part of which tensor lies where in its files."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from clipo_megatron.weights.formats.metadata import METADATA

# Megatron's description of the format.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Where a part of a tensor was written; without `offset`, where an object was."""

    key: str
    file: str
    start: int  # in the file
    length: int
    offset: tuple[int, ...] | None = None  # in the tensor
    sizes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()  # of the whole tensor
    dtype: torch.dtype | None = None


def metadata_files(places: Sequence[FileSpan], common: bytes) -> dict[str, bytes]:
    """Make the files that describe the folder, by name; Megatron reads them first.

    Args:
        places: where every tensor part and object was written.
        common: what is the same on all ranks, as made by `torch_save_bytes`.

    Raises:
        ValueError: a part of a tensor was not written.
    """
    return {
        METADATA: pickle.dumps(_metadata(places)),
        "common.pt": common,
        "metadata.json": json.dumps(_FORMAT).encode(),
    }


def torch_save_bytes(value: object) -> bytes:
    """Return the bytes that `torch.save` writes for a small value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _metadata(places: Sequence[FileSpan]) -> Metadata:
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    kept: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for place in places:
        stored[MetadataIndex(place.key, place.offset)] = _StorageInfo(place.file, place.start, place.length)
        if place.offset is None:
            kept[place.key] = BytesStorageMetadata()
            continue
        held = chunks.setdefault(place.key, [])
        held.append(ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.sizes)))
        kept[place.key] = TensorStorageMetadata(TensorProperties(dtype=place.dtype), torch.Size(place.shape), held)
    for key, held in chunks.items():
        if (count := sum(prod(chunk.sizes) for chunk in held)) != prod(kept[key].size):
            raise ValueError(f"{count} of {prod(kept[key].size)} elements of {key} were written")
    found = Metadata(kept, storage_data=stored, storage_meta=StorageMeta())
    if version := getattr(filesystem, "CURRENT_DCP_VERSION", None):  # torch before 2.8 writes no version
        found.version = version
    return found
