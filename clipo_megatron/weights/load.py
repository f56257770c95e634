"""Hugging Face folder -> the parameters of one rank's model chunk, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_megatron.weights.coverage import match
from clipo_megatron.weights.errors import CoverageError
from clipo_megatron.weights.formats.source import Reader
from clipo_megatron.weights.mapping import Coordinates, MappingEntry


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did."""

    parameters: int  # written, each once
    tensors: tuple[str, ...]  # Hugging Face names it read from
    bytes_read: int  # from the files


def load_into(
    named_parameters: Iterable[tuple[str, Tensor]],
    bound: Sequence[MappingEntry],
    reader: Reader,
    at: Coordinates,
) -> LoadReport:
    """Fill every parameter of a model chunk with the part of the rank `at`, cast to the parameter's dtype and device.

    `named_parameters` are those of the bare Megatron model (no wrapper's prefix), `bound` its `entries`. Everything
    is checked before the first write, so that an error leaves the model as it was; memory beyond the model is one
    parameter. Whether all tensors of the folder are used is a question to all stages: `coverage.check_tensors`.

    Raises:
        CoverageError: parameters, entries and tensors do not match one to one in name and shape; all are listed.
        CheckpointError: a file is missing or damaged.
    """
    parameters: dict[str, Tensor] = dict(named_parameters)
    pairs = match(parameters, bound, at)
    check_shapes(bound, reader)
    before = reader.bytes_read
    with torch.no_grad():
        for name, entry in pairs:
            sources = [reader.view(tensor.name) for tensor in entry.hf]
            size, rank = entry.shard_of(at)
            entry.sharding.shard(sources, parameters[name], rank=rank, size=size)
    tensors = tuple(tensor.name for entry in bound for tensor in entry.hf)
    return LoadReport(parameters=len(pairs), tensors=tensors, bytes_read=reader.bytes_read - before)


def check_shapes(bound: Sequence[MappingEntry], reader: Reader) -> None:
    """Raise a CoverageError that lists every tensor of `bound` that is missing or of another shape."""
    present = set(reader.names())
    problems: list[str] = []
    for tensor in (tensor for entry in bound for tensor in entry.hf):
        if tensor.name not in present:
            problems.append(f"{reader.folder} has no tensor {tensor.name}")
        elif (shape := reader.view(tensor.name).shape) != tensor.shape:
            problems.append(
                f"tensor {tensor.name} of {reader.folder} has shape {list(shape)}; "
                f"its config.json gives {list(tensor.shape)}"
            )
    if problems:
        raise CoverageError(problems)
