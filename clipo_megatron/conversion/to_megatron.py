"""Hugging Face folder -> checkpoint: torch_dist with a key a layer, and the files that stood beside the weights.

OUT/policy/  .metadata, metadata.json, common.pt, one file a rank of the division and part
    __0_tp1_2.distcp     chunk 0, TP rank 1, part 2        __0_ep3_etp0_1.distcp  the experts of EP rank 3
OUT/hf/      config.json, tokenizer, ..., weights.json
OUT/manifest.json
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.config.model_folder import HF_FILES, POLICY, is_checkpoint
from clipo_megatron.conversion.plan import (
    PIECE_BYTES,
    UNIT_BYTES,
    Conversion,
    ConversionError,
    Record,
    Span,
    Tick,
    WorkUnit,
)
from clipo_megatron.runtime.durable_files import StreamedFile, crc32, write_durably
from clipo_megatron.weights.coverage import check_tensors
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.archive import write_tensor
from clipo_megatron.weights.formats.manifest import MANIFEST
from clipo_megatron.weights.formats.reader import HFReader
from clipo_megatron.weights.formats.source import files_beside
from clipo_megatron.weights.formats.torch_dist_writer import FileSpan, description, saved
from clipo_megatron.weights.load import check_shapes
from clipo_megatron.weights.mapping import Coordinates, MappingEntry, PipelineStage
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import RowParallel, Shape, Source, Vocab
from clipo_megatron.weights.spec import read_config

# Megatron's layers ask for a state of theirs that has nothing in it without FP8: all find the same bytes.
_EXTRA_STATE = "__extra_state.distcp"
_WITHOUT_EXTRA_STATE = ("embedding.word_embeddings", "output_layer", ".mlp.router")


@dataclass(frozen=True, slots=True)
class _ChunkTask:
    """Parameters of one chunk, for all ranks that divide them: those of the stage, or of one share of the experts."""

    name: str
    entries: tuple[MappingEntry, ...]  # bound for any of `ranks`: global names, keys and shapes are the same
    ranks: tuple[Coordinates, ...]

    def file(self, at: Coordinates) -> str:
        return f"__{self.name.format(rank=at.etp_rank if self.entries[0].experts else at.tp_rank)}.distcp"


class ToMegatron(Conversion):
    """Conversion of the Hugging Face folder `source` into the checkpoint `target`.

    Args:
        source: with config.json and safetensors.
        target: folder to make.
        division: how training will divide the model, so that each of its ranks finds its part in files of its own. Any
            other division can be loaded too.
        dtype: of the checkpoint; None: of the source.

    Raises:
        UnsupportedModel, CheckpointError, CoverageError: the source cannot be converted, and why.
    """

    checks = ()

    def __init__(
        self, source: Path, target: Path, *, division: ParallelDivision | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if is_checkpoint(source):
            raise ConversionError(f"{source} is a checkpoint already: it loads in any layout. Nothing to convert")
        self.source, self.target, self.dtype = source, target, dtype
        self.division = division or ParallelDivision()
        self.spec = model_spec(read_config(source))
        self.reader = HFReader(source)
        whole = entries(self.spec, PipelineStage(0, self.spec.num_layers, first=True, last=True))
        check_tensors(self.reader, self.spec)
        check_shapes(whole, self.reader)
        self.beside = files_beside(source)
        self.units: Sequence[WorkUnit] = tuple(self._divide())
        self.facts: Mapping[str, object] = {
            "conversion": "to Megatron, 1",
            "source": str(source.resolve()),
            "files": {name: [(stat := (source / name).stat()).st_size, stat.st_mtime_ns] for name in self.reader.files},
            "beside": zlib.crc32(b"".join(self.beside.values())),
            "division": asdict(self.division),
            "dtype": str(dtype),
        }

    def files(self) -> dict[str, int]:
        """Bytes of weights of every file, by name."""
        sizes: dict[str, int] = {}
        for unit in self.units:
            task: _ChunkTask = unit.content
            for at in task.ranks:
                name = f"{POLICY}/{task.file(at)}"
                sizes[name] = sum(
                    prod(entry.kind.local_shape(entry.shapes, entry.cut(at)[0])) * self._dtype(entry).itemsize
                    for entry in task.entries
                    if entry.kind.sharded or entry.cut(at)[1] == 0
                )
        return sizes

    def prepare(self, content: Path) -> None:
        """Make the folders."""
        (content / POLICY).mkdir(exist_ok=True)
        (content / HF_FILES).mkdir(exist_ok=True)

    def write(self, unit: WorkUnit, content: Path, tick: Tick) -> Record:
        """Write the files of a unit, a parameter at a time."""
        task: _ChunkTask = unit.content
        items: list[object] = []
        with ExitStack() as stack:
            files = {at: stack.enter_context(_Stream(content / POLICY / task.file(at), tick)) for at in task.ranks}
            for entry in task.entries:
                for at, part, offset in self._parts(entry, task.ranks):
                    file = files[at]
                    start = file.nbytes
                    write_tensor(part, file)
                    dtype = str(part.dtype).removeprefix("torch.")
                    items.append(
                        [entry.key, dtype, offset, list(part.shape), file.path.name, start, file.nbytes - start]
                    )
            spans = tuple(Span(f"{POLICY}/{file.path.name}", 0, file.nbytes, file.crc32) for file in files.values())
        return Record(unit.name, spans, tuple(items))

    def finish(self, content: Path, records: Sequence[Record]) -> None:
        """Write the metadata, the files beside the weights, and the manifest."""
        extra = saved([None])
        try:
            files = description(self._places(records, len(extra)), saved({}))
        except ValueError as error:
            raise ConversionError(f"{error}: this is a defect of ours") from error
        for name, data in files.items():
            write_durably(content / POLICY / name, data)
        for name, data in self.beside.items():
            write_durably(content / HF_FILES / name, data)
        written = {span.file: {"bytes": span.nbytes, "crc32": span.crc32} for each in records for span in each.spans}
        for path in (content / POLICY).glob("*.distcp"):
            if f"{POLICY}/{path.name}" not in written:
                path.unlink()
        write_durably(content / POLICY / _EXTRA_STATE, extra)
        for folder in (POLICY, HF_FILES):
            for path in (content / folder).iterdir():
                name = f"{folder}/{path.name}"
                if name not in written:
                    written[name] = {"bytes": path.stat().st_size, "crc32": crc32(path)}
        manifest = {"converted_from": self.source.name, "files": dict(sorted(written.items()))}
        write_durably(content / MANIFEST, json.dumps(manifest, indent=1))

    def close(self) -> None:
        """Close the source."""
        self.reader.close()

    # --- division ----------------------------------------------------------------------------------------------------

    def _divide(self) -> Iterator[WorkUnit]:
        division = self.division
        for chunk, stage in enumerate(division.stages(self.spec.num_layers)):
            dense = [entry for entry in entries(self.spec, stage) if not entry.experts and not entry.copy]
            yield from self._units(f"{chunk}_tp{{rank}}", dense, tuple(division.dense_ranks()))
            shares: dict[int, list[Coordinates]] = {}
            if self.spec.experts is not None:
                for at in division.expert_ranks():
                    shares.setdefault(at.ep_rank, []).append(at)
            for share, ranks in shares.items():
                experts = [entry for entry in entries(self.spec, stage, ranks[0]) if entry.experts]
                yield from self._units(f"{chunk}_ep{share}_etp{{rank}}", experts, tuple(ranks))

    def _units(self, name: str, bound: Sequence[MappingEntry], ranks: tuple[Coordinates, ...]) -> Iterator[WorkUnit]:
        """Parameters in order, in runs of UNIT_BYTES or less, or one."""
        run: list[MappingEntry] = []
        nbytes = part = 0
        for entry in (*bound, None):
            size = 0 if entry is None else self._nbytes(entry, ranks)
            if run and (entry is None or nbytes + size > UNIT_BYTES):
                task = _ChunkTask(f"{name}_{part}", tuple(run), ranks)
                yield WorkUnit(task.name.format(rank="*"), nbytes, task)
                run, nbytes, part = [], 0, part + 1
            if entry is not None:
                run.append(entry)
                nbytes += size

    def _nbytes(self, entry: MappingEntry, ranks: Sequence[Coordinates]) -> int:
        size, _ = entry.cut(ranks[0])
        local = entry.kind.local_shape(entry.shapes, size)  # says so where a dimension cannot be divided
        return prod(entry.kind.whole_shape(local, size)) * self._dtype(entry).itemsize

    def _dtype(self, entry: MappingEntry) -> torch.dtype:
        found = {self.reader.stored(tensor.name).dtype for tensor in entry.hf}
        if self.dtype is None and len(found) > 1:
            names = ", ".join(tensor.name for tensor in entry.hf)
            raise ConversionError(f"{names} become one parameter and are of different dtypes {found}: give --dtype")
        return self.dtype or found.pop()

    # --- parameters --------------------------------------------------------------------------------------------------

    def _parts(
        self, entry: MappingEntry, ranks: Sequence[Coordinates]
    ) -> Iterator[tuple[Coordinates, Tensor, list[int]]]:
        """(rank, part, offset of the part in the checkpoint's tensor); a part is some PIECE_BYTES, if it can be cut."""
        dtype, kind = self._dtype(entry), entry.kind
        sources: list[Source] = [self.reader.view(tensor.name) for tensor in entry.hf]
        size, _ = entry.cut(ranks[0])
        local = kind.local_shape(entry.shapes, size)
        if isinstance(kind, RowParallel):
            # Reading a column means reading its rows: all ranks' parts of some rows are made before the next rows.
            rows = _rows_of(PIECE_BYTES, (local[0], local[1] * size), dtype)
            for start in range(0, local[0], rows):
                block = sources[0][start : start + rows]
                for at in ranks:
                    target = torch.empty(block.shape[0], local[1], dtype=dtype)
                    kind.shard([block], target, rank=entry.cut(at)[1], size=size)
                    yield from _laid_out(entry, at, target, _Cut(entry.cut(at)[1], size), first_row=start)
            return
        if isinstance(kind, Vocab):
            rows = _rows_of(PIECE_BYTES, local, dtype)
            for at in ranks:
                first = entry.cut(at)[1] * local[0]
                for start in range(first, first + local[0], rows):
                    target = torch.empty(min(rows, first + local[0] - start), *local[1:], dtype=dtype)
                    kind.shard([sources[0][start : start + target.shape[0]]], target, rank=0, size=1)
                    yield from _laid_out(entry, at, target, _Cut(0, 1), first_row=start)
            return
        wanted = -(-prod(local) * dtype.itemsize // PIECE_BYTES)
        cut = next((n for n in range(wanted, 0, -1) if kind.divides(entry.shapes, size, n)), 1)
        for at in ranks:
            rank = entry.cut(at)[1]
            if rank and not kind.sharded:
                continue
            for number in range(cut):
                target = torch.empty(local[0] // cut, *local[1:], dtype=dtype)
                finer = _Cut(rank * cut + number, size * cut)
                kind.shard(sources, target, rank=finer.rank, size=finer.size)
                yield from _laid_out(entry, at, target, finer)

    def _places(self, records: Sequence[Record], extra: int) -> list[FileSpan]:
        shapes = self._global_shapes()
        found = []
        for record in records:
            for key, dtype, offset, sizes, file, start, length in record.items:
                kind = getattr(torch, dtype)
                found.append(FileSpan(key, file, start, length, tuple(offset), tuple(sizes), tuple(shapes[key]), kind))
        if missing := shapes.keys() - {place.key for place in found}:
            raise ConversionError(f"{', '.join(sorted(missing))} was not written: this is a defect of ours")
        return [*found, *(FileSpan(key, _EXTRA_STATE, 0, extra) for key in self._extra_states())]

    def _extra_states(self) -> Iterator[str]:
        """Keys of every layer's own state: an expert's behind its number."""
        found: dict[str, int] = {}
        for unit in self.units:
            for entry in unit.content.entries:
                module = entry.key.rpartition(".")[0]
                if not module.endswith(_WITHOUT_EXTRA_STATE):
                    found[module] = entry.experts or 1
                if module.endswith("self_attention.linear_qkv"):
                    found[module.replace("linear_qkv", "core_attention")] = 1
        for module, count in found.items():
            yield from (f"{module}._extra_state/shard_{number}_{count}" for number in range(count))

    def _global_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for unit in self.units:
            task: _ChunkTask = unit.content
            for entry in task.entries:
                size, _ = entry.cut(task.ranks[0])
                whole = entry.kind.whole_shape(entry.kind.local_shape(entry.shapes, size), size)
                shapes[entry.key] = (entry.experts, *whole) if entry.experts else whole
        return shapes


@dataclass(frozen=True, slots=True)
class _Cut:
    rank: int
    size: int


def _rows_of(nbytes: int, shape: Shape, dtype: torch.dtype) -> int:
    """Rows that make up so many bytes, but one at least."""
    return max(1, nbytes // (prod(shape[1:]) * dtype.itemsize))


def _laid_out(
    entry: MappingEntry, at: Coordinates, target: Tensor, cut: _Cut, *, first_row: int = 0
) -> Iterator[tuple[Coordinates, Tensor, list[int]]]:
    """The pieces of a part with their offsets; an expert's lie behind its number."""
    for piece in entry.kind.pieces(tuple(target.shape), entry.shapes, rank=cut.rank, size=cut.size):
        part = target[piece.start : piece.stop]
        offset = [piece.offset[0] + first_row, *piece.offset[1:]]
        yield (at, part[None], [entry.expert, *offset]) if entry.experts else (at, part, offset)


class _Stream(StreamedFile):
    """A file whose growth is told."""

    def __init__(self, path: Path, tick: Tick) -> None:
        super().__init__(path)
        self._tick = tick

    def append(self, data: object) -> int:
        """Append all of it, and return the CRC-32 of it alone."""
        before = self.nbytes
        code = super().append(data)
        self._tick(self.nbytes - before)
        return code
