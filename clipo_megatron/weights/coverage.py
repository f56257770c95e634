"""The checks that a mapping matches a model's parameters, and a folder's tensors, one to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from clipo_megatron.weights.errors import CoverageError, UnsupportedModel
from clipo_megatron.weights.families import entries
from clipo_megatron.weights.formats.reader import HFReader
from clipo_megatron.weights.mapping import EMBEDDING, OUTPUT_LAYER, Coordinates, MappingEntry, PipelineStage
from clipo_megatron.weights.prefixes import prefix_problem
from clipo_megatron.weights.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from clipo_megatron.weights.formats.source import Reader

# Element types that weights may have, as safetensors files name them. Integers and 8-bit floats are scaled by numbers
# that stand elsewhere, so they are no weights by themselves.
TRAINABLE = ("BF16", "F16", "F32", "F64")
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
    """Check that the model uses every tensor of the folder once, that none is missing, and that all fit config.json.

    Of the files only their headers are read. The folder of a tied model may hold the output layer too, if it equals the
    embedding bit for bit.

    Raises:
        CoverageError: missing or unknown tensors, or tensors of other shapes or element types; lists all.
        UnsupportedModel: a tied model whose output layer differs from its embedding.
        WeightsFolderError: a file is missing, damaged or truncated.
    """
    present = set(reader.names())
    if spec.num_layers > len(present):  # said before millions of names are made
        found = f"{reader.folder} holds {len(present)} tensors, not even one for each"
        raise CoverageError([f"config.json gives the model {spec.num_layers:,} layers, and {found}"])
    whole = entries(spec, PipelineStage(offset=0, layers=spec.num_layers, first=True, last=True))
    uses = Counter(tensor.name for entry in whole for tensor in entry.hf)
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
    problems += _unfit(whole, reader, present)
    if problems:
        raise CoverageError(problems)


def _no_parameter_takes(reader: Reader, name: str) -> str:
    file = getattr(reader, "unindexed", {}).get(name)
    hidden = f" ({file} holds it, and the folder's index does not name it)" if file else ""
    return f"no parameter takes tensor {name} of {reader.folder}{hidden}"


def check_shapes(bound: Sequence[MappingEntry], reader: Reader) -> None:
    """Raise a CoverageError that lists every tensor of `bound` that is missing, or has another shape or no weights."""
    present = set(reader.names())
    missing = [tensor.name for entry in bound for tensor in entry.hf if tensor.name not in present]
    problems = [f"{reader.folder} has no tensor {name}" for name in missing] + _unfit(bound, reader, present)
    if problems:
        sentence = prefix_problem(missing, sorted(present), reader.folder)
        raise CoverageError([sentence] if sentence else problems)


def _unfit(bound: Sequence[MappingEntry], reader: Reader, present: set[str]) -> list[str]:
    """Sentences on the present tensors of `bound` that have another shape than config.json gives, or no weights."""
    problems: list[str] = []
    for tensor in (tensor for entry in bound for tensor in entry.hf):
        if tensor.name not in present:
            continue
        view = reader.view(tensor.name)
        if view.shape != tensor.shape:
            problems.append(
                f"tensor {tensor.name} of {reader.folder} has shape {list(view.shape)}; "
                f"its config.json gives {list(tensor.shape)}"
            )
        if view.kind not in TRAINABLE:
            problems.append(
                f"tensor {tensor.name} of {reader.folder} holds {view.kind}, and weights are {', '.join(TRAINABLE)}"
            )
    return problems


def _check_tied(reader: Reader) -> None:
    """Compare output layer and embedding; a checkpoint has no output layer of its own."""
    if isinstance(reader, HFReader) and not reader.same_bytes(OUTPUT_LAYER, EMBEDDING):
        raise UnsupportedModel(
            "tie_word_embeddings", True, f"{OUTPUT_LAYER} differs from {EMBEDDING}; set it to false to keep both"
        )
