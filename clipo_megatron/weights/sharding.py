"""`Sharding`: how one Megatron parameter is made of Hugging Face (HF) tensors and divided over tensor-parallel ranks.

Worked example: a Llama with 4 query heads and 2 KV heads, TP 2. Megatron fuses the projections per KV group:
    linear_qkv rows  [q0 q1 k0 v0 | q2 q3 k1 v1]      (each letter is head_dim rows)
    rank 0 holds      q0 q1 k0 v0, rank 1 holds q2 q3 k1 v1
and the MLP per rank: rank r holds [gate_r; up_r], where gate_r is the r-th half of gate_proj.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from clipo_megatron.weights.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Source(Protocol):
    """A full HF tensor, or a view of one in a file that reads only what is indexed."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the full tensor."""
        ...

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """Return the indexed part, in memory."""
        ...


class Sharding(ABC):
    """One way to make a parameter of HF tensors and to divide it over `size` TP ranks.

    A checkpoint holds what one rank without tensor parallelism would hold, whatever it was written from; `whole_shape`,
    `slices` and `row_spans` say where things lie in it.
    """

    sharded: bool = True  # whether the ranks hold different parts

    @abstractmethod
    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        """Return the shape of one rank's parameter, from the shapes of the HF tensors.

        Raises:
            WeightsError: `size` does not divide the dimension that is cut.
        """

    @abstractmethod
    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        """Write the part of `rank`, cast, into `target` [*local_shape]; reads no more of the sources than it must."""

    @abstractmethod
    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        """Write the full HF tensors from the parts of all ranks.

        Args:
            shards: [size, *local_shape].
            targets: one contiguous tensor for each HF tensor, in the rule's order.
        """

    def fits(self, local: Shape, shapes: Sequence[Shape], size: int) -> bool:
        """Tell whether a parameter of shape `local` can hold one rank's part."""
        return local == self.local_shape(shapes, size)

    def can_split(self, shapes: Sequence[Shape], size: int, parts: int) -> bool:
        """Tell whether the parts of `size * parts` ranks are runs of rows of the parts of `size` ranks.

        Then a part can be made in `parts` steps without reading anything twice.
        """
        return parts == 1

    def whole_shape(self, local: Shape, size: int) -> Shape:
        """Return the shape of the checkpoint's tensor, from that of one rank's part."""
        return (local[0] * size, *local[1:]) if self.sharded else local

    def slices(self, local: Shape, shapes: Sequence[Shape], *, rank: int, size: int) -> tuple[ShardSlice, ...]:
        """Say where the part of `rank` lies in the checkpoint's tensor; () where another rank's part is the same."""
        if not self.sharded and rank:
            return ()
        return (ShardSlice(0, local[0], (rank * local[0], *(0 for _ in local[1:]))),)

    def row_spans(self, shapes: Sequence[Shape], source: int) -> Iterator[RowSpan]:
        """Say where the rows of HF tensor number `source` lie in the checkpoint's tensor; columns are the same."""
        yield RowSpan(0, 0, shapes[source][0])


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """Rows start .. stop-1 of one rank's part, and the offset at which they begin in the checkpoint's tensor."""

    start: int
    stop: int
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Neighbouring rows of an HF tensor that are neighbours in the checkpoint's tensor too."""

    start: int  # first row in the HF tensor
    at: int  # first row in the checkpoint's tensor
    rows: int  # number of rows


class Replicated(Sharding):
    """The same tensor on every rank: norms, routers."""

    sharded = False

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        return shapes[0]

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        target.copy_(sources[0][:])

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        targets[0].copy_(shards[0])


class RowParallel(Sharding):
    """Divided along the input features (dim 1): o_proj, down_proj."""

    def whole_shape(self, local: Shape, size: int) -> Shape:
        return local[0], local[1] * size

    def slices(self, local: Shape, shapes: Sequence[Shape], *, rank: int, size: int) -> tuple[ShardSlice, ...]:
        return (ShardSlice(0, local[0], (0, rank * local[1])),)

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        rows, columns = shapes[0]
        return rows, divide(columns, size, "columns")

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        width = target.shape[1]
        target.copy_(sources[0][:, rank * width : (rank + 1) * width])

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        targets[0].unflatten(1, (shards.shape[0], -1)).copy_(shards.transpose(0, 1))


@dataclass(frozen=True)
class Interleaved(Sharding):
    """Column-parallel: divided along the output features (dim 0), after the sources were interleaved by groups of rows.

    With one source and no groups this is plain column parallelism.

    Every source is split into `groups` equal runs of rows. The parameter is run 0 of every source, then run 1 of every
    source, and so on; rank r holds the r-th of `size` equal chunks of it, and a chunk may be a part of a group.
    Biases are the one-dimensional case.
    """

    groups: int | None = None  # None: as many as there are ranks

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        groups = self.groups or size
        rows = sum(divide(shape[0], groups, "rows") for shape in shapes) * groups
        return divide(rows, size, "rows"), *shapes[0][1:]

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        import torch  # here, so that planning needs no torch

        groups = self.groups or size
        rows = [source.shape[0] // groups for source in sources]
        group = sum(rows)
        start = rank * target.shape[0]
        stop = start + target.shape[0]
        # Read the whole groups around this rank's chunk; with more ranks than groups the chunk is a part of one group.
        first, last = start // group, -(-stop // group)
        runs = [
            source[first * n : last * n].unflatten(0, (last - first, n))
            for source, n in zip(sources, rows, strict=True)
        ]
        interleaved = torch.cat(runs, dim=1).flatten(0, 1) if len(runs) > 1 else runs[0].flatten(0, 1)
        target.copy_(interleaved[start - first * group : stop - first * group])

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        groups = self.groups or shards.shape[0]
        interleaved = shards.reshape(groups, -1, *shards.shape[2:])
        runs = interleaved.split([target.shape[0] // groups for target in targets], dim=1)
        for target, run in zip(targets, runs, strict=True):
            target.unflatten(0, (groups, -1)).copy_(run)

    def can_split(self, shapes: Sequence[Shape], size: int, parts: int) -> bool:
        if self.groups is not None and len(shapes) > 1:
            return parts == 1 or self.groups % (size * parts) == 0
        return all(shape[0] % (size * parts) == 0 for shape in shapes)

    def slices(self, local: Shape, shapes: Sequence[Shape], *, rank: int, size: int) -> tuple[ShardSlice, ...]:
        if self.groups is not None or len(shapes) == 1:
            return super().slices(local, shapes, rank=rank, size=size)
        # Interleaved per rank: one rank alone would hold the sources end to end.
        found, start, at, rest = [], 0, 0, tuple(0 for _ in local[1:])
        for shape in shapes:
            rows = shape[0] // size
            found.append(ShardSlice(start, start + rows, (at + rank * rows, *rest)))
            start, at = start + rows, at + shape[0]
        return tuple(found)

    def row_spans(self, shapes: Sequence[Shape], source: int) -> Iterator[RowSpan]:
        groups = self.groups or 1
        rows = [shape[0] // groups for shape in shapes]
        for group in range(groups):
            yield RowSpan(group * rows[source], group * sum(rows) + sum(rows[:source]), rows[source])


class GateUp(Interleaved):
    """gate_proj and up_proj of a gated MLP: rank r holds [gate_r; up_r]."""


class QKV(Interleaved):
    """q_proj, k_proj and v_proj: for each KV head its query heads, then k, then v.

    With more ranks than KV heads a chunk is a part of a group; megatron-core gathers the group before attention
    (`SelfAttention.get_query_key_value_tensors`).
    """

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__(groups=num_kv_heads)


@dataclass(frozen=True)
class Fused(Sharding):
    """One HF tensor that holds the sources of another sharding end to end.

    Hugging Face and Megatron fuse differently: Phi-3's [q; k; v] is interleaved per KV head in Megatron.
    """

    inner: Sharding  # divides its sources along dim 0 alone
    rows: tuple[int, ...]  # of each source

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        return self.inner.local_shape(self._parts(shapes), size)

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        starts = [sum(self.rows[:i]) for i in range(len(self.rows))]
        parts = [_Rows(sources[0], start, rows) for start, rows in zip(starts, self.rows, strict=True)]
        self.inner.shard(parts, target, rank=rank, size=size)

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        self.inner.unshard(shards, targets[0].split(self.rows))

    def can_split(self, shapes: Sequence[Shape], size: int, parts: int) -> bool:
        return self.inner.can_split(self._parts(shapes), size, parts)

    def whole_shape(self, local: Shape, size: int) -> Shape:
        return self.inner.whole_shape(local, size)

    def slices(self, local: Shape, shapes: Sequence[Shape], *, rank: int, size: int) -> tuple[ShardSlice, ...]:
        return self.inner.slices(local, self._parts(shapes), rank=rank, size=size)

    def row_spans(self, shapes: Sequence[Shape], source: int) -> Iterator[RowSpan]:
        start = 0
        for part, rows in enumerate(self.rows):
            for run in self.inner.row_spans(self._parts(shapes), part):
                yield RowSpan(start + run.start, run.at, run.rows)
            start += rows

    def _parts(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [(rows, *shapes[0][1:]) for rows in self.rows]


class _Rows:
    """A run of rows of a source, which is a `Source` itself."""

    def __init__(self, source: Source, start: int, rows: int) -> None:
        self._source, self._start = source, start
        self.shape: Shape = (rows, *source.shape[1:])

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self.shape[0])
        return self._source[(slice(self._start + start, self._start + stop, step), *rest)]


# On GPUs each rank's part of the vocabulary is padded to a multiple of this many rows, the tile of their kernels.
VOCAB_MULTIPLE_ON_GPUS = 64


class Vocab(Sharding):
    """A table with a row for each token, padded with zeros to the rows of the model's parameter."""

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        """Return the smallest shape; models may pad further."""
        rows, *rest = shapes[0]
        return -(-rows // size), *rest

    def fits(self, local: Shape, shapes: Sequence[Shape], size: int) -> bool:
        rows, *rest = shapes[0]
        return local[0] * size >= rows and list(local[1:]) == rest

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        vocab, held = sources[0].shape[0], target.shape[0]
        start = min(rank * held, vocab)
        stop = min(start + held, vocab)
        if stop > start:
            target[: stop - start].copy_(sources[0][start:stop])
        target[stop - start :].zero_()

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        vocab, held = targets[0].shape[0], shards.shape[1]
        full, rest = divmod(vocab, held)
        targets[0][: full * held].unflatten(0, (full, held)).copy_(shards[:full])
        if rest:
            targets[0][full * held :].copy_(shards[full, :rest])


def divide(total: int, parts: int, what: str) -> int:
    """Return `total / parts`; raise a WeightsError that names `what`, and the nearest divisors, for a remainder."""
    if total % parts:
        fewer = next(each for each in range(min(parts, total), 0, -1) if total % each == 0)
        more = next((f" or {each}" for each in range(parts + 1, total + 1) if total % each == 0), "")
        raise WeightsError(f"{total} {what} cannot be divided into {parts} equal parts, but into {fewer}{more}")
    return total // parts
