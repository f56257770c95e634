"""How Megatron's parameters correspond to Hugging Face's tensors: declared once, used in both directions.

A `Rule` names one Megatron parameter, the Hugging Face tensors it is made of, and the `Kind` of the correspondence.
A kind knows two movements that undo each other, both written as whole-tensor operations:

    shard    full HF tensors -> the part of one tensor-parallel (TP) rank
    unshard  the parts of all TP ranks -> full HF tensors

A family is a function from a `ModelSpec` to its rules (see `families`). `entries` binds rules to one model chunk.

Worked example, Llama with 4 query heads, 2 KV heads, TP 2. Megatron fuses the projections per KV group:
    linear_qkv rows  [q0 q1 k0 v0 | q2 q3 k1 v1]      (each letter is head_dim rows)
    rank 0 holds      q0 q1 k0 v0, rank 1 holds q2 q3 k1 v1
and the MLP per rank: rank r holds [gate_r; up_r], where gate_r is the r-th half of gate_proj.
"""

# ruff: noqa: D102  (what the methods of a kind do is said once, on Kind)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from clipo_megatron.weights.errors import WeightsError

Shape = tuple[int, ...]


class Source(Protocol):
    """A full HF tensor, or a file's view of one that reads only what is indexed."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the full tensor."""
        ...

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """The indexed part, in memory."""
        ...


class Kind(ABC):
    """One way in which a parameter is made of HF tensors and divided over `size` TP ranks."""

    sharded: bool = True  # whether the ranks hold different parts

    @abstractmethod
    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        """Shape of one rank's parameter, from the shapes of the HF tensors.

        Raises:
            WeightsError: `size` does not divide the dimension that is cut.
        """

    @abstractmethod
    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        """Write rank's part into `target`, shaped `local_shape`; casts to its dtype, reads no more than it must."""

    @abstractmethod
    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        """Write the full HF tensors from `shards`, [size, *local_shape]; `targets` are contiguous, in rule order."""

    def fits(self, local: Shape, shapes: Sequence[Shape], size: int) -> bool:
        """Whether a parameter of shape `local` can hold one rank's part."""
        return local == self.local_shape(shapes, size)


class Replicated(Kind):
    """The same tensor on every rank: norms, routers."""

    sharded = False

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        return shapes[0]

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        target.copy_(sources[0][:])

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        targets[0].copy_(shards[0])


class Row(Kind):
    """Cut along the input features (dim 1): o_proj, down_proj."""

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        rows, columns = shapes[0]
        return rows, _divide(columns, size, "columns")

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        width = target.shape[1]
        target.copy_(sources[0][:, rank * width : (rank + 1) * width])

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        targets[0].unflatten(1, (shards.shape[0], -1)).copy_(shards.transpose(0, 1))


@dataclass(frozen=True)
class Interleaved(Kind):
    """Cut along the output features (dim 0), after the sources were woven together in groups of rows.

    Every source is split into `groups` equal runs of rows; the parameter is run 0 of every source, run 1 of every
    source, and so on, and rank r holds the r-th of `size` equal chunks of it. A chunk may be a part of a group.
    Biases are the one-dimensional case.
    """

    groups: int | None = None  # None: as many as ranks

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        groups = self.groups or size
        rows = sum(_divide(shape[0], groups, "rows") for shape in shapes) * groups
        return _divide(rows, size, "rows"), *shapes[0][1:]

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        groups = self.groups or size
        rows = [source.shape[0] // groups for source in sources]
        group = sum(rows)
        start = rank * target.shape[0]
        stop = start + target.shape[0]
        # The whole groups around this rank's chunk: more ranks than groups means reading a group for a part of it.
        first, last = start // group, -(-stop // group)
        runs = [
            source[first * n : last * n].unflatten(0, (last - first, n))
            for source, n in zip(sources, rows, strict=True)
        ]
        woven = torch.cat(runs, dim=1).flatten(0, 1) if len(runs) > 1 else runs[0].flatten(0, 1)
        target.copy_(woven[start - first * group : stop - first * group])

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        groups = self.groups or shards.shape[0]
        woven = shards.reshape(groups, -1, *shards.shape[2:])
        runs = woven.split([target.shape[0] // groups for target in targets], dim=1)
        for target, run in zip(targets, runs, strict=True):
            target.unflatten(0, (groups, -1)).copy_(run)


class Column(Interleaved):
    """One source, cut along the output features (dim 0)."""


class GateUp(Interleaved):
    """gate_proj and up_proj of a gated MLP: rank r holds [gate_r; up_r]."""


class QKV(Interleaved):
    """q_proj, k_proj and v_proj: per KV head, its query heads, then k, then v.

    With more ranks than KV heads a chunk is a part of a group; megatron-core gathers the group before attention
    (`SelfAttention.get_query_key_value_tensors`).
    """

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__(groups=num_kv_heads)


@dataclass(frozen=True)
class Fused(Kind):
    """One tensor that holds the sources of another kind end to end, the first with `rows[0]` rows, and so on.

    Fused on Hugging Face's side does not mean fused as Megatron does it: Phi-3's [q; k; v] is woven per KV head here.
    """

    kind: Kind  # one that cuts its sources along dim 0 alone
    rows: tuple[int, ...]

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        return self.kind.local_shape([(rows, *shapes[0][1:]) for rows in self.rows], size)

    def shard(self, sources: Sequence[Source], target: Tensor, *, rank: int, size: int) -> None:
        starts = [sum(self.rows[:i]) for i in range(len(self.rows))]
        parts = [_Rows(sources[0], start, rows) for start, rows in zip(starts, self.rows, strict=True)]
        self.kind.shard(parts, target, rank=rank, size=size)

    def unshard(self, shards: Tensor, targets: Sequence[Tensor]) -> None:
        self.kind.unshard(shards, targets[0].split(self.rows))


class _Rows:
    """A run of rows of a source, as a source of its own."""

    def __init__(self, source: Source, start: int, rows: int) -> None:
        self._source, self._start = source, start
        self.shape: Shape = (rows, *source.shape[1:])

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self.shape[0])
        return self._source[(slice(self._start + start, self._start + stop, step), *rest)]


class Vocab(Kind):
    """Rows of the vocabulary, padded with zeros up to what the model's parameter holds."""

    def local_shape(self, shapes: Sequence[Shape], size: int) -> Shape:
        """The smallest one; models may pad further."""
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


class Place(Enum):
    """Which model chunks hold a parameter."""

    FIRST = "first"  # the one with the embedding
    LAYERS = "layers"  # every one, once a layer: names contain {layer}
    LAST = "last"  # the one with the output layer


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter and the HF tensors it is made of.

    Names may contain `{layer}` and `{expert}`: local to the rank on Megatron's side, global on the other.
    `hf` lists full shapes in the order in which the kind takes the tensors.
    """

    megatron: str | tuple[str, ...]  # alternatives: the local spec's name, then Transformer Engine's
    hf: Mapping[str, Shape]
    kind: Kind
    on: Place = Place.LAYERS
    copy: bool = False  # a second holder of tensors that another rule owns: loaded, never exported
    key: str = ""  # in a torch_dist checkpoint, `{layer}` global; "": the last of `megatron`
    layers: Callable[[int], bool] | None = None  # of the whole model, that have it; None: all
    experts: int = 0  # of the whole model, with one such parameter each; 0: it is no expert's


def fused(rule: Rule, name: str) -> Rule:
    """The same parameter from one HF tensor, `name`, that holds the rule's tensors end to end."""
    shapes = list(rule.hf.values())
    rows = tuple(shape[0] for shape in shapes)
    return replace(rule, hf={name: (sum(rows), *shapes[0][1:])}, kind=Fused(rule.kind, rows))


@dataclass(frozen=True, slots=True)
class Stage:
    """One model chunk: a pipeline stage, or one of its virtual stages."""

    offset: int  # of its first layer, in the whole model
    layers: int
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One rank's place among those that hold a pipeline stage together. Experts are divided apart from all else:
    over `ep` ranks, each with whole experts, and each expert over `etp` ranks."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0

    def experts(self, count: int) -> range:
        """Which of the model's experts this rank holds.

        Raises:
            WeightsError: `ep` does not divide `count`.
        """
        held = _divide(count, self.ep, "experts")
        return range(self.ep_rank * held, (self.ep_rank + 1) * held)


WHOLE = Coordinates()


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A full tensor of the Hugging Face checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule bound to one chunk (and layer): names are final."""

    megatron: tuple[str, ...]
    hf: tuple[HFTensor, ...]
    kind: Kind
    key: str  # in a torch_dist checkpoint
    copy: bool = False
    layer: int | None = None  # of the whole model
    expert: int | None = None  # of the whole model: its place on the first axis under `key`
    experts: int = 0  # of the whole model: the length of that axis; 0: there is no such axis

    def cut(self, at: Coordinates) -> tuple[int, int]:
        """Over how many ranks the parameter is divided, and which of them `at` is."""
        return (at.etp, at.etp_rank) if self.experts else (at.tp, at.tp_rank)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the HF tensors."""
        return tuple(tensor.shape for tensor in self.hf)

    def name_in(self, names: Mapping[str, object]) -> str | None:
        """Which of the alternative names the model uses; None if it has none of them."""
        return next((name for name in self.megatron if name in names), None)


def even_stages(num_layers: int, pp_size: int) -> tuple[Stage, ...]:
    """Equal pipeline stages, in model order.

    Raises:
        WeightsError: `pp_size` does not divide `num_layers`.
    """
    layers = _divide(num_layers, pp_size, "layers")
    return tuple(Stage(i * layers, layers, first=i == 0, last=i == pp_size - 1) for i in range(pp_size))


def bind(rules: Iterable[Rule], stage: Stage, at: Coordinates = WHOLE) -> tuple[Entry, ...]:
    """The entries of one chunk on one rank, in the order of the model: embedding, layers, output."""
    by_place: dict[Place, list[Rule]] = {place: [] for place in Place}
    for rule in rules:
        by_place[rule.on].append(rule)
    bound: list[Entry] = []
    if stage.first:
        bound += [_bind(rule) for rule in by_place[Place.FIRST]]
    for local in range(stage.layers):
        layer = stage.offset + local
        for rule in by_place[Place.LAYERS]:
            if rule.layers is not None and not rule.layers(layer):
                continue
            if rule.experts:
                bound += [
                    _bind(rule, local, layer, number, expert) for number, expert in enumerate(at.experts(rule.experts))
                ]
            else:
                bound.append(_bind(rule, local, layer))
    if stage.last:
        # A copy exists to reach another chunk: within the owner's own chunk the parameter itself is shared.
        bound += [_bind(rule) for rule in by_place[Place.LAST] if not (rule.copy and stage.first)]
    return tuple(bound)


def _bind(rule: Rule, local: int = 0, layer: int | None = None, number: int = 0, expert: int | None = None) -> Entry:
    """Local and global number of the layer, and of the expert."""
    names = (rule.megatron,) if isinstance(rule.megatron, str) else rule.megatron
    return Entry(
        megatron=tuple(name.format(layer=local, expert=number) for name in names),
        hf=tuple(HFTensor(name.format(layer=layer, expert=expert), shape) for name, shape in rule.hf.items()),
        kind=rule.kind,
        key=(rule.key or names[-1]).format(layer=layer),
        copy=rule.copy,
        layer=layer,
        expert=expert,
        experts=rule.experts,
    )


def _divide(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise WeightsError(f"{total} {what} cannot be divided into {parts} equal parts")
    return total // parts
