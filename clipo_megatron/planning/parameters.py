"""Counts the parameters of each rank through the weight mapping, so that they are what a rank will build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from clipo_megatron.weights.families import entries
from clipo_megatron.weights.mapping import Coordinates, PipelineStage
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import Vocab
from clipo_megatron.weights.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters a rank or model has, those of experts apart."""

    dense: int  # parameters of no expert; the optimizer divides them over dp ranks
    expert: int  # parameters of experts; the optimizer divides them over dp * tp / (ep * etp) ranks

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.dense + self.expert

    def __add__(self, other: ParameterCount) -> ParameterCount:
        return ParameterCount(self.dense + other.dense, self.expert + other.expert)


def rank_count(
    spec: ModelSpec, division: ParallelDivision, pp_rank: int, at: Coordinates | None = None, *, vocab_multiple: int = 1
) -> ParameterCount:
    """Count the parameters of one rank.

    Args:
        spec: the architecture of the model.
        division: the parallel sizes.
        pp_rank: the rank's pipeline stage; all its chunks are counted.
        at: the rank's place in the stage; None: the first. All ranks of a stage hold equally many.
        vocab_multiple: multiple of rows to which each rank's part of the vocabulary is padded:
            `VOCAB_MULTIPLE_ON_GPUS`, or 1 on a CPU.

    Raises:
        WeightsError: the division does not fit the model.
    """
    at = at or Coordinates(tp=division.tp, ep=division.ep, etp=division.expert_tp)
    chunks = stage_chunks(spec.num_layers, division)[pp_rank]
    return sum((_chunk_count(spec, stage, at, vocab_multiple) for stage in chunks), ParameterCount(0, 0))


@lru_cache(maxsize=4096)
def stage_chunks(num_layers: int, division: ParallelDivision) -> tuple[tuple[PipelineStage, ...], ...]:
    """Return the model chunks of each pipeline rank."""
    chunks = tuple(enumerate(division.stages(num_layers)))
    return tuple(tuple(stage for i, stage in chunks if division.owner(i) == rank) for rank in range(division.pp))


@lru_cache(maxsize=4096)
def stage_counts(spec: ModelSpec, division: ParallelDivision, vocab_multiple: int = 1) -> tuple[ParameterCount, ...]:
    """Count the parameters of one rank of each pipeline stage."""
    return tuple(rank_count(spec, division, rank, vocab_multiple=vocab_multiple) for rank in range(division.pp))


@lru_cache(maxsize=4096)
def whole_count(spec: ModelSpec) -> ParameterCount:
    """Count the parameters of the whole model; a tied output layer counts once."""
    return _chunk_count(spec, PipelineStage(0, spec.num_layers, first=True, last=True), Coordinates(), 1)


def active_count(spec: ModelSpec) -> int:
    """Count the parameters that each token is multiplied with: the output layer, but not the embedding."""
    whole = whole_count(spec)
    table = spec.vocab_size * spec.hidden_size
    idle = 0 if spec.experts is None else whole.expert * (1 - spec.experts.per_token / spec.experts.count)
    return int(whole.total - idle) - (0 if spec.tied_embeddings else table)


@lru_cache(maxsize=65536)
def _chunk_count(spec: ModelSpec, stage: PipelineStage, at: Coordinates, vocab_multiple: int) -> ParameterCount:
    """Count one dense and one sparse layer, since layers of a kind are alike: plans of large models are repeated."""
    alike: dict[bool, list[int]] = {}
    for layer in range(stage.offset, stage.offset + stage.layers):
        alike.setdefault(spec.is_sparse(layer), []).append(layer)
    ends = PipelineStage(stage.offset, 0, first=stage.first, last=stage.last)
    total = _sum(_sizes(spec, ends, at, vocab_multiple))
    for layers in alike.values():
        one = _layer_count(spec, _first_alike(spec, layers[0]), at)
        total += ParameterCount(one.dense * len(layers), one.expert * len(layers))
    return total


@lru_cache(maxsize=4096)
def _layer_count(spec: ModelSpec, layer: int, at: Coordinates) -> ParameterCount:
    return _sum(_sizes(spec, PipelineStage(layer, 1, first=False, last=False), at, 1))


def _first_alike(spec: ModelSpec, layer: int) -> int:
    """Return the model's first layer that is dense or sparse as `layer` is."""
    return next(each for each in range(layer + 1) if spec.is_sparse(each) == spec.is_sparse(layer))


def _sum(sizes: Iterator[tuple[int, bool]]) -> ParameterCount:
    dense = expert = 0
    for size, of_expert in sizes:
        expert, dense = (expert + size, dense) if of_expert else (expert, dense + size)
    return ParameterCount(dense, expert)


def _sizes(spec: ModelSpec, stage: PipelineStage, at: Coordinates, vocab_multiple: int) -> Iterator[tuple[int, bool]]:
    """Yield the number of elements of each parameter, and whether it belongs to an expert."""
    for entry in entries(spec, stage, at):
        size, _ = entry.shard_of(at)
        shape = entry.sharding.local_shape(entry.shapes, size)
        if isinstance(entry.sharding, Vocab):
            shape = (-(-shape[0] // vocab_multiple) * vocab_multiple, *shape[1:])
        yield prod(shape), bool(entry.experts)
