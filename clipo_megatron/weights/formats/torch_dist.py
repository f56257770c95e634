"""Reads rows of tensors in torch_dist checkpoints, the format of torch.distributed.checkpoint that Megatron writes.

`.metadata` says which part of which tensor lies where in which file. Each part is an uncompressed archive of
`torch.save`, so any of its rows can be read from their place in the file, and nothing else is read.

Keys are Megatron's: one for each layer ("decoder.layers.7.mlp.linear_fc2.weight"), or one for all layers, stacked on a
first axis, as older checkpoints have it. The experts of a layer are stacked on the next axis.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.formats.archive import find_elements
from clipo_megatron.weights.formats.metadata import METADATA, read_metadata
from clipo_megatron.weights.formats.safetensors import read_exactly
from clipo_megatron.weights.sharding import RowSpan, Shape


@dataclass(slots=True)
class TensorBox:
    """A part of a tensor, in a file."""

    offset: Shape  # in the tensor
    sizes: Shape
    file: str
    start: int  # offset of its archive in the file
    length: int  # of its archive
    data: int | None = None  # offset of its elements in the file; None: not looked up yet


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of a checkpoint and its parts."""

    dtype: torch.dtype
    shape: Shape
    boxes: tuple[TensorBox, ...]  # sorted by offset


class TorchDist:
    """The tensors of a torch_dist folder by key. Several threads may read at a time.

    Raises:
        WeightsFolderError: the folder is not of this format, or damaged; names file and key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, io.FileIO] = {}
        self._lock = threading.Lock()
        self.tensors = self._catalogue()

    def read(self, key: str, rows: RowSpan, lead: Sequence[int] = (), *, into: Tensor) -> None:
        """Fill `into` [rows, ...] with `rows.rows` rows from row `rows.at` on.

        `lead` are the indices on the leading axes, layer and expert, if the tensor has them.
        """
        tensor = self.tensors[key]
        axis, done = len(lead), 0
        for box in tensor.boxes:
            if any(not low <= at < low + size for at, low, size in zip(lead, box.offset, box.sizes, strict=False)):
                continue
            low, size = box.offset[axis], box.sizes[axis]
            first, last = max(rows.at, low), min(rows.at + rows.rows, low + size)
            if first >= last:
                continue
            place = 0
            for at, start, extent in zip(lead, box.offset, box.sizes, strict=False):
                place = place * extent + at - start
            skip = (place * size + first - low) * prod(box.sizes[axis + 1 :])
            target = into[first - rows.at : last - rows.at]
            self._read_box(tensor, key, box, axis, skip, target)
            done += (last - first) * prod(box.sizes[axis + 1 :])
        if done != into.numel():
            raise WeightsFolderError(
                f"{self.folder} holds {done} of {into.numel()} elements of rows {rows.at} to {rows.at + rows.rows} of "
                f"{key}: the checkpoint is incomplete"
            )

    def close(self) -> None:
        """Close the files; calling it again does nothing."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _read_box(
        self, tensor: CheckpointTensor, key: str, box: TensorBox, axis: int, skip: int, target: Tensor
    ) -> None:
        """Read neighbouring rows of a box, from its element `skip` on, into their columns of `target`."""
        file = self._open(box.file)
        if box.data is None:
            box.data = self._locate(tensor, key, box, file)
        start = box.data + skip * tensor.dtype.itemsize
        path = self.folder / box.file
        rest = box.sizes[axis + 1 :]
        if tuple(target.shape[1:]) == rest and target.is_contiguous():
            read_exactly(file.fileno(), target, start, path)
            return
        part = torch.empty((target.shape[0], *rest), dtype=tensor.dtype)
        read_exactly(file.fileno(), part, start, path)
        column = box.offset[axis + 1]
        target[:, column : column + rest[0]].copy_(part)

    def _locate(self, tensor: CheckpointTensor, key: str, box: TensorBox, file: io.FileIO) -> int:
        """Return where a box's elements begin in its file."""
        path = self.folder / box.file
        try:
            found = find_elements(file.fileno(), box.start, box.length)
        except (ValueError, KeyError, OSError) as error:
            raise WeightsFolderError(f"{path} is damaged or truncated at {key}: {error}") from error
        if (found.dtype, found.shape) != (tensor.dtype, box.sizes):
            raise WeightsFolderError(
                f"{path} is damaged: it holds {found.dtype} {list(found.shape)} where {METADATA} promises "
                f"{tensor.dtype} {list(box.sizes)} of {key}"
            )
        return found.start

    def _open(self, name: str) -> io.FileIO:
        with self._lock:
            if name not in self._files:
                path = self.folder / name
                try:
                    self._files[name] = path.open("rb", buffering=0)
                except OSError as error:
                    raise WeightsFolderError(f"{path} cannot be read: {error.strerror}") from error
            return self._files[name]

    def _catalogue(self) -> dict[str, CheckpointTensor]:
        metadata = read_metadata(self.folder)
        boxes: dict[str, list[TensorBox]] = {}
        for index, info in metadata.storage_data.items():
            if index.offset is not None and not getattr(info, "transform_descriptors", None):
                boxes.setdefault(index.fqn, []).append(
                    TensorBox(tuple(index.offset), (), info.relative_path, info.offset, info.length)
                )
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):
                continue
            sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks}
            ordered = tuple(sorted(boxes.get(key, []), key=lambda box: box.offset))
            for box in ordered:
                if box.offset not in sizes:
                    raise WeightsFolderError(
                        f"{self.folder / METADATA} is damaged: it places a part of {key} at {list(box.offset)}, where "
                        "it names none"
                    )
                box.sizes = sizes[box.offset]
            tensors[key] = CheckpointTensor(tensor.properties.dtype, tuple(tensor.size), ordered)
        return tensors
