"""Reads a torch_dist checkpoint as if it were a Hugging Face folder: Hugging Face's tensors, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.families import entries
from clipo_megatron.weights.formats.header import kind_of
from clipo_megatron.weights.formats.safetensors import SlicedRead
from clipo_megatron.weights.formats.torch_dist import TorchDist
from clipo_megatron.weights.mapping import MappingEntry, PipelineStage
from clipo_megatron.weights.sharding import RowSpan, Shape
from clipo_megatron.weights.spec import ModelSpec

MASTER = "optimizer.master."  # prefix of the keys of fp32 masters in a training checkpoint
_LAYER = "decoder.layers."


class TorchDistView(SlicedRead):
    """A Hugging Face tensor in a torch_dist checkpoint; indexing it reads only the rows that are asked for."""

    def __init__(self, reader: TorchDistReader, place: _Place) -> None:
        super().__init__(place.shape)
        self.dtype: torch.dtype = reader.store.tensors[place.key].dtype
        self._reader, self._place = reader, place

    @property
    def kind(self) -> str:
        """The element type as safetensors files name it."""
        return kind_of(self.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read_into(torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.dtype), start)

    def read_into(self, target: Tensor, start: int) -> Tensor:
        """Fill `target` [rows, ...], which has the view's dtype, with the rows from `start` on."""
        stop = start + target.shape[0]
        for run in self._place.entry.sharding.row_spans(self._place.entry.shapes, self._place.source):
            first, last = max(start, run.start), min(stop, run.start + run.rows)
            if first < last:
                moved = RowSpan(first, run.at + first - run.start, last - first)
                into = target[first - start : last - start]
                self._reader.store.read(self._place.key, moved, self._place.lead, into=into)
        return target

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        part = super().__getitem__(index)
        self._reader.bytes_read += part.nbytes
        return part


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a Hugging Face tensor lies in a checkpoint."""

    key: str
    lead: tuple[int, ...]  # layer and expert, if the checkpoint's tensor has axes for them
    entry: MappingEntry
    source: int  # index among the entry's tensors

    @property
    def shape(self) -> Shape:
        return self.entry.hf[self.source].shape


class TorchDistReader:
    """The Hugging Face tensors of a torch_dist folder by name, with the methods of `HFReader`.

    Args:
        folder: the folder with `.metadata`.
        spec: the architecture of the model.
        master: whether to read the fp32 masters of a training checkpoint instead of the parameters.

    Raises:
        WeightsFolderError: the folder is damaged, or holds another model; names file or key.
    """

    def __init__(self, folder: str | Path, spec: ModelSpec, *, master: bool = False) -> None:
        self.folder = Path(folder)
        self.store = TorchDist(self.folder)
        self.bytes_read = 0
        if master and not any(key.startswith(MASTER) for key in self.store.tensors):
            raise WeightsFolderError(
                f"{self.folder} holds no optimizer's masters: only checkpoints of training do. Leave the option out to "
                "get the parameters"
            )
        self._prefix = MASTER if master else ""
        self._places = dict(self._find(spec))

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, sorted."""
        return tuple(sorted(self._places))

    def names_in_order(self) -> tuple[str, ...]:
        """Return the names of all tensors, in model order."""
        return tuple(self._places)

    def get(self, name: str) -> Tensor:
        """Read a whole tensor into memory."""
        return self.view(name)[:]

    def view(self, name: str) -> TorchDistView:
        """Return a view of a tensor, which has its shape and dtype and reads parts of it when it is indexed."""
        if name not in self._places:
            raise WeightsFolderError(f"{self.folder} has no tensor {name!r}")
        return TorchDistView(self, self._places[name])

    @property
    def unknown(self) -> list[str]:
        """Keys of parameters that the model does not have."""
        used = {place.key for place in self._places.values()}
        return sorted(
            key
            for key in self.store.tensors
            if key.startswith(("decoder.", "embedding.", "output_layer.")) and self._prefix + key not in used
        )

    def close(self) -> None:
        """Close the files; calling it again does nothing."""
        self.store.close()

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, spec: ModelSpec) -> Iterator[tuple[str, _Place]]:
        """Find the tensors that are there; `coverage.check_tensors` tells which are missing."""
        whole = PipelineStage(offset=0, layers=spec.num_layers, first=True, last=True)
        for entry in entries(spec, whole):
            if entry.copy:
                continue
            key, lead = self._prefix + entry.key, ()
            stacked = self._prefix + entry.key.replace(f"{_LAYER}{entry.layer}.", _LAYER, 1)
            if key not in self.store.tensors and entry.layer is not None and stacked in self.store.tensors:
                key, lead = stacked, (entry.layer,)
            if key not in self.store.tensors:
                continue
            if entry.experts:
                lead = (*lead, entry.expert)
            self._check_shape(key, lead, entry, spec)
            for source, tensor in enumerate(entry.hf):
                yield tensor.name, _Place(key, lead, entry, source)

    def _check_shape(self, key: str, lead: tuple[int, ...], entry: MappingEntry, spec: ModelSpec) -> None:
        found = self.store.tensors[key].shape
        axes = [spec.num_layers] if entry.layer is not None and len(lead) > bool(entry.experts) else []
        axes += [entry.experts] if entry.experts else []
        if list(found[: len(axes)]) != axes or not entry.sharding.fits(found[len(axes) :], entry.shapes, 1):
            expected = [*axes, *entry.sharding.local_shape(entry.shapes, 1)]
            raise WeightsFolderError(
                f"{self.folder}: {key} has shape {list(found)}, and the model's config.json gives {expected}"
            )
