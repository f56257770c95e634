"""How rollout servers hold a model: the Hugging Face tensors that each of their tensors is made of, and how their
tensor-parallel ranks divide it.

`fused_projections` describes what SGLang and vLLM do with all families so far: query, key and value are one tensor,
gate and up are one, and a tied output layer is the embedding. A family names it as its `server_layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from clipo_megatron.weights.mapping import EMBEDDING, OUTPUT_LAYER, MappingEntry
from clipo_megatron.weights.sharding import QKV, Fused, GateUp, Replicated, RowParallel, Sharding, Vocab

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_MULTIPLE = 64  # rows to which both engines pad an embedding
CPU_MLP_MULTIPLE = 32  # rows a rank to which SGLang pads the MLP on a CPU, where its kernels want that

# Takes (full HF tensors, rank, number of ranks); returns the parts that make up the rank's tensor, end to end.
Cut = Callable[[Sequence["Tensor"], int, int], list["Tensor"]]


@dataclass(frozen=True, slots=True)
class ServerTensor:
    """One tensor as a rollout server holds it."""

    name: str
    sources: tuple[str, ...]  # Hugging Face names, in the order in which they lie in the tensor
    cut: Cut
    replicated: bool = False  # every rank holds the same
    optional: bool = False  # some servers have it, some do not


def fused_projections(entry: MappingEntry, mlp_multiple: int) -> ServerTensor:
    """Describe the server's tensor for one parameter; each rank's share of the MLP is padded to `mlp_multiple`."""
    sources = tuple(tensor.name for tensor in entry.hf)
    sharding, name = entry.sharding, sources[0]
    if isinstance(sharding, QKV):
        name = name.replace("q_proj", "qkv_proj")
    elif isinstance(sharding, GateUp):
        name = name.replace("gate_proj", "gate_up_proj")
    multiple = mlp_multiple if ".mlp." in name else 1
    return ServerTensor(name, sources, _cut_of(sharding, multiple), replicated=isinstance(sharding, Replicated))


def tied_output_layer() -> ServerTensor:
    """Describe the output layer of a tied model, which some servers name beside the embedding."""
    return ServerTensor(OUTPUT_LAYER, (EMBEDDING,), _vocabulary, optional=True)


def _cut_of(sharding: Sharding, multiple: int) -> Cut:
    match sharding:
        case Replicated():
            return _whole
        case Vocab():
            return _vocabulary
        case QKV():
            return partial(_query_key_value, sharding.groups)
        case GateUp():
            return partial(_rows, multiple)
        case RowParallel():
            return partial(_columns, multiple)
        case Fused():
            return partial(_within, sharding.rows, _cut_of(sharding.inner, multiple))
    raise NotImplementedError(f"how servers cut a {type(sharding).__name__} tensor is not declared")


def _whole(tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    return list(tensors)


def _within(rows: Sequence[int], cut: Cut, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    """Apply a cut to the parts that lie end to end in one tensor."""
    (tensor,) = tensors
    return cut(tensor.split(rows), rank, size)


def _rows(multiple: int, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    parts: list[Tensor] = []
    for tensor in tensors:
        held, start, stop = _share(tensor.shape[0], multiple, rank, size)
        parts.append(tensor[start:stop])
        if stop - start < held:
            parts.append(tensor.new_zeros(held - (stop - start), *tensor.shape[1:]))
    return parts


def _columns(multiple: int, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    (tensor,) = tensors
    held, start, stop = _share(tensor.shape[1], multiple, rank, size)
    part = tensor[:, start:stop]
    if stop - start < held:
        padded = tensor.new_zeros(tensor.shape[0], held)
        padded[:, : stop - start] = part
        part = padded
    return [part]


def _share(features: int, multiple: int, rank: int, size: int) -> tuple[int, int, int]:
    """Return how many features a rank holds with its padding, and the first and the end of those that are real."""
    held = -(-features // (multiple * size)) * multiple
    start = min(rank * held, features)
    return held, start, min(start + held, features)


def _query_key_value(kv_heads: int, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    """Cut q, k and v; with more ranks than KV heads, neighbouring ranks hold the same KV head."""
    query, key, value = tensors
    copies = max(1, size // kv_heads)
    return [_slice(query, rank, size), *(_slice(each, rank // copies, size // copies) for each in (key, value))]


def _vocabulary(tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    (tensor,) = tensors
    rows = tensor.shape[0]
    held = -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // size
    start, stop = rank * held, (rank + 1) * held
    padding = stop - max(start, min(stop, rows))
    return [tensor[start:stop], *([tensor.new_zeros(padding, *tensor.shape[1:])] if padding else [])]


def _slice(tensor: Tensor, rank: int, size: int) -> Tensor:
    rows = tensor.shape[0] // size
    return tensor[rank * rows : (rank + 1) * rows]
