"""From a Hugging Face folder to a checkpoint: torch_dist with keys for each layer, and the sidecar files.

OUT/policy/  .metadata, metadata.json, common.pt, one file for each rank and part
    __0_tp1_2.distcp     chunk 0, TP rank 1, part 2        __0_ep3_etp0_1.distcp  the experts of EP rank 3
OUT/hf/      config.json, tokenizer, ..., weights.json
OUT/manifest.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.config.model_folder import HF_FILES, POLICY, is_checkpoint
from clipo_megatron.conversion.conversion import (
    PIECE_BYTES,
    UNIT_BYTES,
    Conversion,
    ConversionError,
    Tick,
    WorkUnit,
)
from clipo_megatron.runtime.durable_files import StreamedFile, crc32, write_durably
from clipo_megatron.runtime.manifest import FORMAT, MANIFEST
from clipo_megatron.weights.coverage import check_tensors
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.archive import write_tensor
from clipo_megatron.weights.formats.reader import HFReader
from clipo_megatron.weights.formats.source import sidecar_files
from clipo_megatron.weights.formats.torch_dist_writer import FileSpan, metadata_files, torch_save_bytes
from clipo_megatron.weights.mapping import Coordinates, MappingEntry
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import RowParallel, Shape, Source, Vocab
from clipo_megatron.weights.spec import read_config

# Megatron's layers ask for an extra state, which is empty without FP8: all of them find the same bytes.
_EXTRA_STATE = "__extra_state.distcp"
_WITHOUT_EXTRA_STATE = ("embedding.word_embeddings", "output_layer", ".mlp.router")


@dataclass(frozen=True, slots=True)
class _ChunkTask:
    """Parameters of one model chunk, for all ranks that divide them.

    They are either all but the experts of a layer run, or experts that one EP rank holds.
    """

    name: str  # of the files, with {rank} for the rank
    entries: tuple[MappingEntry, ...]  # bound for any of `ranks`: global names, keys and shapes are the same
    ranks: tuple[Coordinates, ...]

    def file(self, at: Coordinates) -> str:
        return f"__{self.name.format(rank=at.etp_rank if self.entries[0].experts else at.tp_rank)}.distcp"


class ToMegatron(Conversion):
    """The conversion of the Hugging Face folder `source` into the checkpoint `target`.

    Args:
        source: with config.json and safetensors.
        target: folder to make.
        division: the parallel sizes that training will probably have: each rank then finds its part in files of its
            own. Runs with other sizes can load the checkpoint too.
        dtype: of the checkpoint; None: of the source.

    Raises:
        UnsupportedModel, WeightsFolderError, CoverageError: the source cannot be converted, and why.
    """

    source_files = ()

    def __init__(
        self, source: Path, target: Path, *, division: ParallelDivision | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if is_checkpoint(source):
            raise ConversionError(f"{source} is a checkpoint already: it loads in any layout. Nothing to convert")
        self.source, self.target, self.dtype = source, target, dtype
        self.division = division or ParallelDivision()
        self.spec = model_spec(read_config(source))
        self.reader = HFReader(source)
        check_tensors(self.reader, self.spec)
        self.sidecar_files = sidecar_files(source)
        self.units: Sequence[WorkUnit] = tuple(self._divide())
        self._written: dict[str, _Written] = {}  # by unit

    def files(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for unit in self.units:
            task: _ChunkTask = unit.content
            for at in task.ranks:
                name = f"{POLICY}/{task.file(at)}"
                sizes[name] = sum(
                    prod(entry.sharding.local_shape(entry.shapes, entry.shard_of(at)[0])) * self._dtype(entry).itemsize
                    for entry in task.entries
                    if entry.sharding.sharded or entry.shard_of(at)[1] == 0
                )
        return sizes

    def prepare(self, content: Path) -> None:
        (content / POLICY).mkdir()
        (content / HF_FILES).mkdir()

    def write(self, unit: WorkUnit, content: Path, tick: Tick) -> Sequence[Path]:
        """Write the files of a unit, one parameter at a time."""
        task: _ChunkTask = unit.content
        spans: list[FileSpan] = []
        with ExitStack() as stack:
            files = {at: stack.enter_context(_Stream(content / POLICY / task.file(at), tick)) for at in task.ranks}
            for entry in task.entries:
                shape = _checkpoint_shape(entry, task.ranks[0])
                for at, part, offset in self._parts(entry, task.ranks):
                    file, name = files[at], files[at].path.name
                    start = file.nbytes
                    write_tensor(part, file)
                    length, sizes = file.nbytes - start, tuple(part.shape)
                    spans.append(FileSpan(entry.key, name, start, length, tuple(offset), sizes, shape, part.dtype))
        sums = {file.path.name: {"bytes": file.nbytes, "crc32": file.crc32} for file in files.values()}
        self._written[unit.name] = _Written(spans, sums)
        return [file.path for file in files.values()]

    def finish(self, content: Path) -> None:
        """Write the metadata, the sidecar files and the manifest."""
        policy, extra = content / POLICY, torch_save_bytes([None])
        written = [self._written[unit.name] for unit in self.units]  # in the same order every time
        spans = [span for each in written for span in each.spans]
        spans += [FileSpan(key, _EXTRA_STATE, 0, len(extra)) for key in self._extra_states()]
        for name, data in metadata_files(spans, torch_save_bytes({})).items():
            write_durably(policy / name, data)
        write_durably(policy / _EXTRA_STATE, extra)
        for name, data in self.sidecar_files.items():
            write_durably(content / HF_FILES / name, data)
        files = {f"{POLICY}/{name}": sums for each in written for name, sums in each.files.items()}
        for path in (*policy.iterdir(), *(content / HF_FILES).iterdir()):
            name = f"{path.parent.name}/{path.name}"
            if name not in files:
                files[name] = {"bytes": path.stat().st_size, "crc32": crc32(path)}
        manifest = {"format": FORMAT, "converted_from": self.source.name, "files": dict(sorted(files.items()))}
        write_durably(content / MANIFEST, json.dumps(manifest, indent=1))

    def close(self) -> None:
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
        """Divide parameters, in order, into runs of at most UNIT_BYTES, or of one parameter that is larger."""
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
        return prod(_checkpoint_shape(entry, ranks[0])) // (entry.experts or 1) * self._dtype(entry).itemsize

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
        """Yield (rank, part, offset in the checkpoint's tensor); a part has about PIECE_BYTES where it can be split."""
        dtype, sharding = self._dtype(entry), entry.sharding
        sources: list[Source] = [self.reader.view(tensor.name) for tensor in entry.hf]
        size, _ = entry.shard_of(ranks[0])
        local = sharding.local_shape(entry.shapes, size)
        if isinstance(sharding, RowParallel):
            # Reading columns means reading whole rows, so the parts of all ranks are made of some rows before the next.
            rows = _rows_of(PIECE_BYTES, (local[0], local[1] * size), dtype)
            for start in range(0, local[0], rows):
                block = sources[0][start : start + rows]
                for at in ranks:
                    target = torch.empty(block.shape[0], local[1], dtype=dtype)
                    sharding.shard([block], target, rank=entry.shard_of(at)[1], size=size)
                    yield from _laid_out(entry, at, target, _Cut(entry.shard_of(at)[1], size), first_row=start)
            return
        if isinstance(sharding, Vocab):
            rows = _rows_of(PIECE_BYTES, local, dtype)
            for at in ranks:
                first = entry.shard_of(at)[1] * local[0]
                for start in range(first, first + local[0], rows):
                    target = torch.empty(min(rows, first + local[0] - start), *local[1:], dtype=dtype)
                    sharding.shard([sources[0][start : start + target.shape[0]]], target, rank=0, size=1)
                    yield from _laid_out(entry, at, target, _Cut(0, 1), first_row=start)
            return
        wanted = -(-prod(local) * dtype.itemsize // PIECE_BYTES)
        cut = next((n for n in range(wanted, 0, -1) if sharding.can_split(entry.shapes, size, n)), 1)
        for at in ranks:
            rank = entry.shard_of(at)[1]
            if rank and not sharding.sharded:
                continue
            for number in range(cut):
                target = torch.empty(local[0] // cut, *local[1:], dtype=dtype)
                finer = _Cut(rank * cut + number, size * cut)
                sharding.shard(sources, target, rank=finer.rank, size=finer.size)
                yield from _laid_out(entry, at, target, finer)

    def _extra_states(self) -> Iterator[str]:
        """Yield the key of every layer's extra state; those of experts are numbered."""
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


def _checkpoint_shape(entry: MappingEntry, at: Coordinates) -> Shape:
    """Return the shape of the checkpoint's tensor, experts on its first axis; refuses sizes that do not divide."""
    size, _ = entry.shard_of(at)
    whole = entry.sharding.whole_shape(entry.sharding.local_shape(entry.shapes, size), size)
    return (entry.experts, *whole) if entry.experts else whole


@dataclass(frozen=True, slots=True)
class _Written:
    """Where a unit has written its tensors, and the checksums of its files."""

    spans: list[FileSpan]
    files: dict[str, dict[str, int]]  # "bytes" and "crc32" by file name


@dataclass(frozen=True, slots=True)
class _Cut:
    """Names one of `size` equal parts of a parameter: number `rank`."""

    rank: int
    size: int


def _rows_of(nbytes: int, shape: Shape, dtype: torch.dtype) -> int:
    """Return how many rows make up `nbytes`, at least one."""
    return max(1, nbytes // (prod(shape[1:]) * dtype.itemsize))


def _laid_out(
    entry: MappingEntry, at: Coordinates, target: Tensor, cut: _Cut, *, first_row: int = 0
) -> Iterator[tuple[Coordinates, Tensor, list[int]]]:
    """Yield the slices of a part with their offsets; those of an expert begin with its number."""
    for piece in entry.sharding.slices(tuple(target.shape), entry.shapes, rank=cut.rank, size=cut.size):
        part = target[piece.start : piece.stop]
        offset = [piece.offset[0] + first_row, *piece.offset[1:]]
        yield (at, part[None], [entry.expert, *offset]) if entry.experts else (at, part, offset)


class _Stream(StreamedFile):
    """A file that counts what is written to it."""

    def __init__(self, path: Path, tick: Tick) -> None:
        super().__init__(path)
        self._tick = tick

    def append(self, data: object) -> int:
        before = self.nbytes
        code = super().append(data)
        self._tick(self.nbytes - before)
        return code
