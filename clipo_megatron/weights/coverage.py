"""The checks that a mapping matches a model's parameters, and a folder's tensors, one to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from clipo_megatron.weights.errors import CoverageError, UnsupportedModel
from clipo_megatron.weights.families import entries
from clipo_megatron.weights.formats.source import Reader
from clipo_megatron.weights.mapping import EMBEDDING, OUTPUT_LAYER, Coordinates, MappingEntry, PipelineStage
from clipo_megatron.weights.prefixes import prefix_problem
from clipo_megatron.weights.spec import ModelSpec

# Buffers that old releases of transformers saved, and that config.json determines.
IGNORED = ("*.rotary_emb.inv_freq",)


def match(
    parameters: Mapping[str, Tensor], bound: Sequence[MappingEntry], at: Coordinates
) -> list[tuple[str, MappingEntry]]:
    """Pair every parameter of one model chunk with its entry, in the order of the entries; needs shapes only.

    Raises:
        CoverageError: parameters without entry, entries without parameter, or shapes that do not fit; lists all.
    """
    pairs: list[tuple[str, MappingEntry]] = []
    problems: list[str] = []
    for entry in bound:
        name = entry.name_in(parameters)
        sources = ", ".join(tensor.name for tensor in entry.hf)
        if name is None:
            problems.append(f"the model has no parameter {' or '.join(entry.megatron)} to take {sources}")
            continue
        pairs.append((name, entry))
        local = tuple(parameters[name].shape)
        size, _ = entry.shard_of(at)
        if not entry.sharding.fits(local, entry.shapes, size):
            expected = entry.sharding.local_shape(entry.shapes, size)
            problems.append(
                f"parameter {name} has shape {list(local)}; {sources} over {size} TP ranks give {list(expected)}"
            )
    taken = {name for name, _ in pairs}
    problems += [f"nothing fills parameter {name}" for name in parameters if name not in taken]
    if problems:
        raise CoverageError(problems)
    return pairs


def check_tensors(reader: Reader, spec: ModelSpec) -> None:
    """Check that the model uses every tensor of the folder once, and that none is missing.

    The folder of a tied model may hold the output layer too, if it equals the embedding bit for bit.

    Raises:
        CoverageError: missing or unknown tensors; lists all.
        UnsupportedModel: a tied model whose output layer differs from its embedding.
    """
    whole = entries(spec, PipelineStage(offset=0, layers=spec.num_layers, first=True, last=True))
    uses = Counter(tensor.name for entry in whole for tensor in entry.hf)
    present = set(reader.names())
    unknown = {name for name in present - set(uses) if not any(fnmatchcase(name, pattern) for pattern in IGNORED)}
    if spec.tied_embeddings and OUTPUT_LAYER in unknown and EMBEDDING in present:
        _check_tied(reader)
        unknown.discard(OUTPUT_LAYER)
    missing = sorted(set(uses) - present)
    problems = [f"{reader.folder} has no tensor {name}" for name in missing]
    problems += [_no_parameter_takes(reader, name) for name in sorted(unknown)]
    problems += [f"{count} parameters take tensor {name}" for name, count in uses.items() if count > 1]
    if sentence := prefix_problem(missing, sorted(unknown), reader.folder):
        raise CoverageError([sentence])
    if problems:
        raise CoverageError(problems)


def _no_parameter_takes(reader: Reader, name: str) -> str:
    file = getattr(reader, "unindexed", {}).get(name)
    hidden = f" ({file} holds it, and the folder's index does not name it)" if file else ""
    return f"no parameter takes tensor {name} of {reader.folder}{hidden}"


def _check_tied(reader: Reader, rows: int = 4096) -> None:
    """Compare output layer and embedding, `rows` rows at a time."""
    output, embedding = reader.view(OUTPUT_LAYER), reader.view(EMBEDDING)
    equal = output.shape == embedding.shape and all(
        torch.equal(output[start : start + rows], embedding[start : start + rows])
        for start in range(0, output.shape[0], rows)
    )
    if not equal:
        raise UnsupportedModel(
            "tie_word_embeddings", True, f"{OUTPUT_LAYER} differs from {EMBEDDING}; set it to false to keep both"
        )
