"""Reading torch_dist checkpoints (torch.distributed.checkpoint's files, as Megatron writes them) without loading them.

`.metadata` says which box of which tensor lies where in which file; each box there is what `torch.save` made of it, an
uncompressed archive. So any rows of any box can be read from their place in the file, and nothing else is.

Keys are Megatron's: one a layer ("decoder.layers.7.mlp.linear_fc2.weight"), or one for all layers, stacked on a first
axis, as older checkpoints have it. Experts are stacked behind that.
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
from clipo_megatron.weights.formats.archive import MetadataUnpickler, find_elements
from clipo_megatron.weights.formats.manifest import read_checked
from clipo_megatron.weights.formats.safetensors import read_exactly
from clipo_megatron.weights.sharding import RowSpan, Shape

METADATA = ".metadata"


@dataclass(slots=True)
class Box:
    """A part of a tensor in a file."""

    offset: Shape
    sizes: Shape
    file: str
    start: int  # of what torch.save wrote, in the file
    length: int
    data: int | None = None  # where the elements begin in the file; None: not looked up yet


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of the checkpoint."""

    dtype: torch.dtype
    shape: Shape
    boxes: tuple[Box, ...]  # by offset


class TorchDist:
    """The tensors of a torch_dist folder by key. Several threads may read at once.

    Raises:
        CheckpointError: the folder is none, or damaged; the message names file and key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, io.FileIO] = {}
        self._lock = threading.Lock()
        self.tensors = self._catalogue()

    def read(self, key: str, rows: RowSpan, lead: Sequence[int] = (), *, into: Tensor) -> None:
        """Fill `into` [rows, ...] with `rows.rows` rows from row `rows.at` on.

        `lead` are indices of the leading axes that are left out: layer, expert.
        """
        kept = self.tensors[key]
        axis, done = len(lead), 0
        for box in kept.boxes:
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
            self._read_box(kept, key, box, axis, skip, target)
            done += (last - first) * prod(box.sizes[axis + 1 :])
        if done != into.numel():
            raise WeightsFolderError(
                f"{self.folder} holds {done} of {into.numel()} elements of rows {rows.at} to {rows.at + rows.rows} of "
                f"{key}: the checkpoint is incomplete"
            )

    def close(self) -> None:
        """Close the files. Idempotent."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _read_box(self, kept: Kept, key: str, box: Box, axis: int, skip: int, target: Tensor) -> None:
        """Read neighbouring rows of a box, `skip` elements behind its first, to their columns of `target`."""
        file = self._open(box.file)
        if box.data is None:
            box.data = self._locate(kept, key, box, file)
        start = box.data + skip * kept.dtype.itemsize
        path = self.folder / box.file
        rest = box.sizes[axis + 1 :]
        if tuple(target.shape[1:]) == rest and target.is_contiguous():
            read_exactly(file.fileno(), target, start, path)
            return
        part = torch.empty((target.shape[0], *rest), dtype=kept.dtype)
        read_exactly(file.fileno(), part, start, path)
        column = box.offset[axis + 1]
        target[:, column : column + rest[0]].copy_(part)

    def _locate(self, kept: Kept, key: str, box: Box, file: io.FileIO) -> int:
        """Where a box's elements begin: after the header of the archive's member that holds them."""
        path = self.folder / box.file
        try:
            found = find_elements(file.fileno(), box.start, box.length)
        except (ValueError, KeyError, OSError) as error:
            raise WeightsFolderError(f"{path} is damaged or truncated at {key}: {error}") from error
        if (found.dtype, found.shape) != (kept.dtype, box.sizes):
            raise WeightsFolderError(
                f"{path} is damaged: it holds {found.dtype} {list(found.shape)} where {METADATA} promises {kept.dtype} "
                f"{list(box.sizes)} of {key}"
            )
        return found.start

    def _open(self, name: str) -> io.FileIO:
        with self._lock:
            if name not in self._files:
                path = self.folder / name
                if Path(name).name != name:
                    raise WeightsFolderError(f"{self.folder / METADATA} names a file outside its folder: {name}")
                try:
                    self._files[name] = path.open("rb", buffering=0)
                except OSError as error:
                    raise WeightsFolderError(f"{path} cannot be read: {error.strerror}") from error
            return self._files[name]

    def _catalogue(self) -> dict[str, Kept]:
        path = self.folder / METADATA
        try:
            metadata = MetadataUnpickler(io.BytesIO(read_checked(path))).load()
            boxes: dict[str, list[Box]] = {}
            for index, info in metadata.storage_data.items():
                if index.offset is not None and not getattr(info, "transform_descriptors", None):
                    boxes.setdefault(index.fqn, []).append(
                        Box(tuple(index.offset), (), info.relative_path, info.offset, info.length)
                    )
            tensors = {}
            for key, kept in metadata.state_dict_metadata.items():
                if not isinstance(kept, TensorStorageMetadata):
                    continue
                sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in kept.chunks}
                for box in boxes.get(key, []):
                    box.sizes = sizes[box.offset]
                ordered = tuple(sorted(boxes.get(key, []), key=lambda box: box.offset))
                tensors[key] = Kept(kept.properties.dtype, tuple(kept.size), ordered)
        except FileNotFoundError:
            raise WeightsFolderError(f"{self.folder} has no {METADATA}: it is no torch_dist checkpoint") from None
        except WeightsFolderError:
            raise
        except Exception as error:  # a changed byte of a pickle can end in any of them, MemoryError too
            raise WeightsFolderError(f"{path} is damaged or truncated: {error!r}") from error
        return tensors
