"""From a checkpoint to a Hugging Face folder: safetensors with an index, config, tokenizer.

A checkpoint that was converted knows how its source was divided over files. The output is divided in the same way, and
its files are the source's byte for byte if the dtypes are the same.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path

import torch

from clipo_megatron.config.model_folder import HF_FILES, POLICY, hf_folder, is_checkpoint
from clipo_megatron.conversion.conversion import (
    PIECE_BYTES,
    UNIT_BYTES,
    Conversion,
    ConversionError,
    SourceFile,
    Tick,
    WorkUnit,
)
from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.runtime.manifest import read_manifest
from clipo_megatron.weights.coverage import check_tensors
from clipo_megatron.weights.errors import CoverageError, WeightsFolderError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.metadata import METADATA
from clipo_megatron.weights.formats.reader import INDEX, SINGLE
from clipo_megatron.weights.formats.safetensors import Header, as_bytes, build_header, parse_header
from clipo_megatron.weights.formats.source import SOURCE_HEADERS, sidecar_files
from clipo_megatron.weights.formats.torch_dist_reader import TorchDistReader
from clipo_megatron.weights.mapping import EMBEDDING, OUTPUT_LAYER
from clipo_megatron.weights.spec import read_config

SHARD_BYTES = 5_000_000_000  # largest output file, unless the user asks for another size
_WRITE_BYTES = 1 << 18  # of one system call; larger ones cost more a byte
_DTYPE_FIELDS = ("torch_dtype", "dtype")  # of config.json: before transformers 5, and since


@dataclass(frozen=True, slots=True)
class _FileTask:
    """Neighbouring tensors of one output file."""

    file: str
    names: tuple[str, ...]


class ToHF(Conversion):
    """The conversion of the checkpoint `source` into the Hugging Face folder `target`.

    Args:
        source: a checkpoint of conversion or training, or a bare torch_dist folder; `newest_step` finds a run's.
        target: folder to make.
        dtype: of the output; None: of the checkpoint.
        shard_bytes: largest output file; None: as the checkpoint's own source was divided, if that is known.
        master: whether to export the optimizer's fp32 masters instead of the parameters.
        hf: folder with config.json and tokenizer, for a checkpoint without them.

    Raises:
        UnsupportedModel, WeightsFolderError, CoverageError, ConversionError: it cannot be converted, and why.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int | None = None,
        master: bool = False,
        hf: Path | None = None,
    ) -> None:
        self.source, self.target, self.dtype = source, target, dtype
        self.policy = source / POLICY if is_checkpoint(source) else source
        self.source_files = tuple(self._source_files(source))
        self.sidecar_files = self._sidecar_files(source, hf)
        config = read_config(hf_folder(hf or source))
        self.spec = model_spec(config)
        self.reader = TorchDistReader(self.policy, self.spec, master=master)
        check_tensors(self.reader, self.spec)
        if self.reader.unknown:
            raise CoverageError([f"no parameter takes {key} of {self.policy}" for key in self.reader.unknown])
        self.headers, self.index, self.dropped = self._layout(shard_bytes)
        self.units: Sequence[WorkUnit] = tuple(self._divide())
        self.buffers = threading.local()

    def files(self) -> dict[str, int]:
        return {name: header.size for name, header in self.headers.items()}

    def prepare(self, content: Path) -> None:
        """Make the files in their full size, with their headers."""
        for name, header in self.headers.items():
            with (content / name).open("wb", buffering=0) as file:
                file.truncate(header.size)
                file.write(header.bytes)

    def write(self, unit: WorkUnit, content: Path, tick: Tick) -> Sequence[Path]:
        task: _FileTask = unit.content
        header, path = self.headers[task.file], content / task.file
        end = header.tensors[task.names[0]].start
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for name in task.names:
                for piece in self._pieces(name, header):
                    end = _write_at(descriptor, piece, end)
                    tick(len(piece))
        finally:
            os.close(descriptor)
        return [path]

    def finish(self, content: Path) -> None:
        for name, data in self.sidecar_files.items():
            if name == "config.json":
                data = self._config(data)
            if name != SOURCE_HEADERS:
                write_durably(content / name, data)
        if self.index is not None:
            write_durably(content / INDEX, self.index)

    def close(self) -> None:
        self.reader.close()

    # --- source ------------------------------------------------------------------------------------------------------

    def _source_files(self, source: Path) -> Iterator[SourceFile]:
        """List the files of a checkpoint that are read; a bare torch_dist folder has no manifest of its own."""
        if not is_checkpoint(source):
            if not (source / METADATA).is_file():
                raise WeightsFolderError(
                    f"{source} is no checkpoint: it has neither {POLICY}/{METADATA} nor {METADATA}. Give the folder of "
                    "one checkpoint, such as checkpoints/step_000010"
                )
            return
        for name, entry in read_manifest(source)["files"].items():
            if name.startswith((f"{POLICY}/", f"{HF_FILES}/")):
                path = source / name
                size = path.stat().st_size if path.is_file() else None
                if size != entry["bytes"]:  # before anything tries to read it
                    found = "is missing" if size is None else f"has {size} bytes, {entry['bytes']} were written"
                    raise WeightsFolderError(f"{path} {found}: the checkpoint is damaged. Restore it from a copy")
                yield SourceFile(path, entry["bytes"], entry["crc32"])

    def _sidecar_files(self, source: Path, other: Path | None) -> dict[str, bytes]:
        if other is None and not (hf_folder(source) / "config.json").is_file():
            raise ConversionError(
                f"{source} holds no {HF_FILES}/ with config.json and tokenizer (it is older than that, or not ours): "
                "give the folder of the model it was trained from with --hf"
            )
        return sidecar_files(other or source)

    # --- layout ------------------------------------------------------------------------------------------------------

    def _stored_as(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the output."""
        return self.dtype or self.reader.view(self._origin(name)).dtype

    def _origin(self, name: str) -> str:
        """Return the checkpoint's name of a tensor: a tied output layer is its embedding."""
        return EMBEDDING if self.spec.tied_embeddings and name == OUTPUT_LAYER else name

    def _layout(self, shard_bytes: int | None) -> tuple[dict[str, Header], str | None, list[str]]:
        """Make the headers of all files and the index's text, and list tensors that only the source has."""
        if shard_bytes is None and SOURCE_HEADERS in self.sidecar_files:
            return self._as_source()
        most = shard_bytes or SHARD_BYTES
        shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
        filled = 0
        for name in self.reader.names_in_order():
            view, dtype = self.reader.view(name), self._stored_as(name)
            nbytes = prod(view.shape) * dtype.itemsize
            if shards[-1] and filled + nbytes > most:
                shards.append([])
                filled = 0
            shards[-1].append((name, dtype, view.shape))
            filled += nbytes
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        headers = {name: build_header(shard) for name, shard in zip(names, shards, strict=True)}
        return headers, self._index(headers) if count > 1 else None, []

    def _as_source(self) -> tuple[dict[str, Header], str | None, list[str]]:
        try:
            layout = json.loads(self.sidecar_files[SOURCE_HEADERS])
            sources = {Path(name).name: parse_header(text, name) for name, text in layout["headers"].items()}
            index = layout["index"]
            indexed = set() if index is None else set(json.loads(index)["weight_map"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsFolderError(f"{self.source}/{HF_FILES}/{SOURCE_HEADERS} is damaged: {error!r}") from error
        present = set(self.reader.names())
        headers, dropped, changed = {}, [], False
        for file, header in sources.items():
            kept = [name for name in header.tensors if self._origin(name) in present]
            for name in kept:
                if header.tensors[name].shape != self.reader.view(self._origin(name)).shape:
                    raise WeightsFolderError(
                        f"{self.source}/{HF_FILES}/{SOURCE_HEADERS} is damaged: it gives {name} another shape than the "
                        "checkpoint holds"
                    )
            dropped += [name for name in header.tensors if name not in kept]
            wanted = [(name, self._stored_as(name), header.tensors[name].shape) for name in kept]
            if wanted == [(name, stored.dtype, stored.shape) for name, stored in header.tensors.items()]:
                headers[file] = header
            else:
                headers[file], changed = build_header(wanted), True
        missing = present - {name for header in headers.values() for name in header.tensors}
        if missing:
            raise CoverageError(
                [f"{HF_FILES}/{SOURCE_HEADERS} has no place for tensor {name}" for name in sorted(missing)]
            )
        if index is None:
            return headers, None, dropped
        complete = {name for header in headers.values() for name in header.tensors} <= indexed
        return headers, index if complete and not changed else self._index(headers), dropped

    @staticmethod
    def _index(headers: Mapping[str, Header]) -> str:
        places = {name: file for file, header in headers.items() for name in header.tensors}
        total = sum(stored.nbytes for header in headers.values() for stored in header.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        return json.dumps(index, indent=2) + "\n"

    def _divide(self) -> Iterator[WorkUnit]:
        """Take units from all files in turn: two threads that write to one file wait for each other."""
        files = [list(self._units(file, header)) for file, header in self.headers.items()]
        for turn in zip_longest(*files):
            yield from (unit for unit in turn if unit is not None)

    @staticmethod
    def _units(file: str, header: Header) -> Iterator[WorkUnit]:
        run: list[str] = []
        nbytes = 0
        for name, stored in header.tensors.items():
            if run and nbytes + stored.nbytes > UNIT_BYTES:
                yield WorkUnit(f"{file}:{run[0]}", nbytes, _FileTask(file, tuple(run)))
                run, nbytes = [], 0
            run.append(name)
            nbytes += stored.nbytes
        if run:
            yield WorkUnit(f"{file}:{run[0]}", nbytes, _FileTask(file, tuple(run)))

    # --- tensors -----------------------------------------------------------------------------------------------------

    def _pieces(self, name: str, header: Header) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces; each is valid until the next is taken."""
        view, dtype = self.reader.view(self._origin(name)), header.tensors[name].dtype
        row = prod(view.shape[1:])
        rows = max(1, PIECE_BYTES // (row * max(view.dtype.itemsize, dtype.itemsize)))
        for start in range(0, view.shape[0], rows):
            count = min(rows, view.shape[0] - start)
            read = self._buffer("read", view.dtype, count * row).view(count, *view.shape[1:])
            view.read_into(read, start)
            if view.dtype == dtype:
                yield as_bytes(read)
            else:
                yield as_bytes(self._buffer("cast", dtype, count * row).copy_(read.view(-1)))

    def _buffer(self, use: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """Return memory of this thread, which is used again for the next piece."""
        held = self.buffers.__dict__.get(use)
        if held is None or held.numel() < numel * dtype.itemsize:
            held = self.buffers.__dict__[use] = torch.empty(max(numel * dtype.itemsize, PIECE_BYTES), dtype=torch.uint8)
        return held[: numel * dtype.itemsize].view(dtype)

    def _config(self, data: bytes) -> bytes:
        """Return config.json with the dtype that most of the output has."""
        sizes: dict[torch.dtype, int] = {}
        for header in self.headers.values():
            for stored in header.tensors.values():
                sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.nbytes // stored.dtype.itemsize
        name = str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")
        config = json.loads(data)
        present = [field for field in _DTYPE_FIELDS if field in config]
        if all(config[field] == name for field in present) and (present or self.dtype is None):
            return data
        config |= dict.fromkeys(present or _DTYPE_FIELDS[:1], name)
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write bytes to their place in an open file and return the offset after them."""
    for start in range(0, len(data), _WRITE_BYTES):
        piece = data[start : start + _WRITE_BYTES]
        while piece:
            count = os.pwrite(descriptor, piece, offset)
            piece, offset = piece[count:], offset + count
    return offset
