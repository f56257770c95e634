"""Loading: from a folder of weights into the parameters of one rank's model chunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clipo_megatron.weights.coverage import check_shapes, match
from clipo_megatron.weights.formats.source import Reader
from clipo_megatron.weights.mapping import Coordinates, MappingEntry


def load_into(
    named_parameters: Iterable[tuple[str, Tensor]],
    bound: Sequence[MappingEntry],
    reader: Reader,
    at: Coordinates,
) -> None:
    """Fill every parameter of a model chunk with the part of the rank `at`, cast to the parameter's dtype and device.

    Everything is checked before the first write, so that an error leaves the model as it was. Needs memory for one
    parameter beside the model. Whether the whole model uses all tensors of the folder is for `coverage.check_tensors`.

    Args:
        named_parameters: of the bare Megatron model, without the prefix of a wrapper.
        bound: the `entries` of the chunk on this rank.
        reader: the open folder.
        at: this rank.

    Raises:
        CoverageError: parameters, entries and tensors do not match one to one in name and shape; lists all.
        WeightsFolderError: a file is missing or damaged.
    """
    parameters: dict[str, Tensor] = dict(named_parameters)
    pairs = match(parameters, bound, at)
    check_shapes(bound, reader)
    with torch.no_grad():
        for name, entry in pairs:
            sources = [reader.view(tensor.name) for tensor in entry.hf]
            size, rank = entry.shard_of(at)
            entry.sharding.shard(sources, parameters[name], rank=rank, size=size)
