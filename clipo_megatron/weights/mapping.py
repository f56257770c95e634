"""How Megatron's parameters correspond to Hugging Face's tensors: declared once, used in both directions.

A `Rule` names one Megatron parameter, the Hugging Face tensors it is made of, and the `Sharding` of the correspondence
(see `kinds`). A kind knows two movements that undo each other, both written as whole-tensor operations:

    shard    full HF tensors -> the part of one tensor-parallel (TP) rank
    unshard  the parts of all TP ranks -> full HF tensors

A family is a function from a `ModelSpec` to its rules (see `families`). `entries` binds rules to one model chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from clipo_megatron.weights.sharding import (
    Fused,
    Shape,
    Sharding,
    divide,
)


class ChunkScope(Enum):
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
    kind: Sharding
    on: ChunkScope = ChunkScope.LAYERS
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
class PipelineStage:
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
        held = divide(count, self.ep, "experts")
        return range(self.ep_rank * held, (self.ep_rank + 1) * held)


WHOLE = Coordinates()


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A full tensor of the Hugging Face checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class MappingEntry:
    """A rule bound to one chunk (and layer): names are final."""

    megatron: tuple[str, ...]
    hf: tuple[HFTensor, ...]
    kind: Sharding
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


def even_stages(num_layers: int, pp_size: int) -> tuple[PipelineStage, ...]:
    """Equal pipeline stages, in model order.

    Raises:
        WeightsError: `pp_size` does not divide `num_layers`.
    """
    layers = divide(num_layers, pp_size, "layers")
    return tuple(PipelineStage(i * layers, layers, first=i == 0, last=i == pp_size - 1) for i in range(pp_size))


def bind(rules: Iterable[Rule], stage: PipelineStage, at: Coordinates = WHOLE) -> tuple[MappingEntry, ...]:
    """The entries of one chunk on one rank, in the order of the model: embedding, layers, output."""
    by_place: dict[ChunkScope, list[Rule]] = {place: [] for place in ChunkScope}
    for rule in rules:
        by_place[rule.on].append(rule)
    bound: list[MappingEntry] = []
    if stage.first:
        bound += [_bind(rule) for rule in by_place[ChunkScope.FIRST]]
    for local in range(stage.layers):
        layer = stage.offset + local
        for rule in by_place[ChunkScope.LAYERS]:
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
        bound += [_bind(rule) for rule in by_place[ChunkScope.LAST] if not (rule.copy and stage.first)]
    return tuple(bound)


def _bind(
    rule: Rule, local: int = 0, layer: int | None = None, number: int = 0, expert: int | None = None
) -> MappingEntry:
    """Local and global number of the layer, and of the expert."""
    names = (rule.megatron,) if isinstance(rule.megatron, str) else rule.megatron
    return MappingEntry(
        megatron=tuple(name.format(layer=local, expert=number) for name in names),
        hf=tuple(HFTensor(name.format(layer=layer, expert=expert), shape) for name, shape in rule.hf.items()),
        kind=rule.kind,
        key=(rule.key or names[-1]).format(layer=layer),
        copy=rule.copy,
        layer=layer,
        expert=expert,
        experts=rule.experts,
    )
