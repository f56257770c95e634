"""How Megatron's parameters correspond to Hugging Face's tensors: declared once, used in both directions.

A `Rule` names one Megatron parameter, the Hugging Face (HF) tensors it is made of, and its `Sharding` (see `sharding`),
which knows two operations that undo each other:

    shard    full HF tensors -> the part of one tensor-parallel (TP) rank
    unshard  the parts of all TP ranks -> full HF tensors

A family (see `families`) makes the rules of a model from its `ModelSpec`; `bind` applies them to one model chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from clipo_megatron.weights.sharding import Fused, Shape, Sharding, divide

EMBEDDING, OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"  # in Hugging Face's names


class ChunkScope(Enum):
    """Which model chunks hold a parameter."""

    FIRST = "first"  # the chunk with the embedding
    LAYERS = "layers"  # every chunk, once for each layer: names contain {layer}
    LAST = "last"  # the chunk with the output layer


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter and the HF tensors it is made of.

    Names may contain `{layer}` and `{expert}`: numbers on this rank in Megatron's names, in the whole model in HF's.
    """

    megatron: str | tuple[str, ...]  # its name, or two: in Megatron's local layers, then in Transformer Engine's
    hf: Mapping[str, Shape]  # full shapes by name, in the order in which the sharding takes the tensors
    sharding: Sharding
    scope: ChunkScope = ChunkScope.LAYERS
    copy: bool = False  # a second holder of tensors that another rule owns: loaded, never exported
    key: str = ""  # in a torch_dist checkpoint, with the layer's number in the whole model; "": the last name
    layers: Callable[[int], bool] | None = None  # whether a layer of the whole model has it; None: all have
    experts: int = 0  # number of experts of a layer, each with such a parameter; 0: it does not belong to an expert


def fused(rule: Rule, name: str) -> Rule:
    """Read the same parameter from one HF tensor, `name`, that holds the rule's tensors end to end."""
    shapes = list(rule.hf.values())
    rows = tuple(shape[0] for shape in shapes)
    return replace(rule, hf={name: (sum(rows), *shapes[0][1:])}, sharding=Fused(rule.sharding, rows))


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """One model chunk: a pipeline stage, or one of its virtual stages."""

    offset: int  # index of its first layer in the whole model
    layers: int  # number of layers
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One rank's place among the ranks that hold a pipeline stage together.

    Experts are divided in their own way: over `ep` groups, each of which holds whole experts, and each expert over the
    `etp` ranks of its group. Everything else is divided over `tp` ranks.
    """

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0

    def experts(self, count: int) -> range:
        """Return which of the `count` experts of a layer this rank holds.

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
    """A rule bound to one chunk, and to one layer and expert where it has them: its names are final."""

    megatron: tuple[str, ...]  # alternative names of the parameter
    hf: tuple[HFTensor, ...]
    sharding: Sharding
    key: str  # of the checkpoint's tensor in torch_dist
    copy: bool = False
    layer: int | None = None  # index in the whole model
    expert: int | None = None  # index in the whole model: its place on the first axis of the checkpoint's tensor
    experts: int = 0  # length of that axis; 0: there is no such axis

    def shard_of(self, at: Coordinates) -> tuple[int, int]:
        """Return over how many ranks the parameter is divided, and which of them `at` is."""
        return (at.etp, at.etp_rank) if self.experts else (at.tp, at.tp_rank)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Full shapes of the HF tensors."""
        return tuple(tensor.shape for tensor in self.hf)

    def name_in(self, names: Mapping[str, object]) -> str | None:
        """Return which of the alternative names a model with parameters `names` uses; None: none of them."""
        return next((name for name in self.megatron if name in names), None)


def even_stages(num_layers: int, pp_size: int) -> tuple[PipelineStage, ...]:
    """Divide layers into equal pipeline stages, in model order.

    Raises:
        WeightsError: `pp_size` does not divide `num_layers`.
    """
    layers = divide(num_layers, pp_size, "layers")
    return tuple(PipelineStage(i * layers, layers, first=i == 0, last=i == pp_size - 1) for i in range(pp_size))


def bind(rules: Iterable[Rule], stage: PipelineStage, at: Coordinates = WHOLE) -> tuple[MappingEntry, ...]:
    """Bind rules to one chunk on one rank, in the order of the model: embedding, layers, output layer."""
    by_scope: dict[ChunkScope, list[Rule]] = {scope: [] for scope in ChunkScope}
    for rule in rules:
        by_scope[rule.scope].append(rule)
    bound: list[MappingEntry] = []
    if stage.first:
        bound += [_bind(rule) for rule in by_scope[ChunkScope.FIRST]]
    for local in range(stage.layers):
        layer = stage.offset + local
        for rule in by_scope[ChunkScope.LAYERS]:
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
        bound += [_bind(rule) for rule in by_scope[ChunkScope.LAST] if not (rule.copy and stage.first)]
    return tuple(bound)


def _bind(
    rule: Rule, local: int = 0, layer: int | None = None, number: int = 0, expert: int | None = None
) -> MappingEntry:
    """Bind one rule; `local` and `number` are the layer's and the expert's indices on this rank."""
    names = (rule.megatron,) if isinstance(rule.megatron, str) else rule.megatron
    return MappingEntry(
        megatron=tuple(name.format(layer=local, expert=number) for name in names),
        hf=tuple(HFTensor(name.format(layer=layer, expert=expert), shape) for name, shape in rule.hf.items()),
        sharding=rule.sharding,
        key=(rule.key or names[-1]).format(layer=layer),
        copy=rule.copy,
        layer=layer,
        expert=expert,
        experts=rule.experts,
    )
