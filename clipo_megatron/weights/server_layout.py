"""How a server of rollouts holds a model: which Hugging Face tensors each of its own is made of, and how its ranks
divide it.

SGLang and vLLM agree on this for the families here: query, key and value are one tensor, gate and up are one, a tied
output layer is none. Declared once, for whoever has to say what a server ought to hold.

Not declared are experts: servers stack a layer's into two tensors, and the trainer's ranks each send some of them, so
nobody has all that such a tensor is made of. A proof of a sync names these tensors as unproven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.spec import ModelSpec

VOCABULARY_MULTIPLE = 64  # rows to which both engines pad an embedding
CPU_MLP_MULTIPLE = 32  # rows a rank to which SGLang pads the MLP on a CPU, where its kernels want that

DECLARED = ("llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe")  # families
# of them, those whose Hugging Face tensors are fused already: [q; k; v] and [gate; up]
FUSED = ("phi3",)

# (tensors, rank, size) -> parts that make up one rank's tensor when they are laid end to end
Cut = Callable[[Sequence[Tensor], int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class ServedTensor:
    """One tensor of a server."""

    name: str
    sources: tuple[str, ...]  # Hugging Face names, in the order in which they lie in it
    cut: Cut
    replicated: bool = False  # every rank holds the same
    optional: bool = False  # some servers have it, some do not


def served_tensors(spec: ModelSpec, *, mlp_multiple: int = 1) -> list[ServedTensor]:
    """Everything that a server of this model holds, but for experts: servers stack those, in forms of their own.

    Args:
        spec: of the model.
        mlp_multiple: inner features of the MLP that each rank's share is padded to a multiple of, with zeros.

    Raises:
        UnsupportedModel: nobody has declared how servers hold this family.
    """
    if spec.family not in DECLARED:
        raise UnsupportedModel("model_type", spec.family, "how servers hold its tensors is not declared")
    embedding = "model.embed_tokens.weight"
    output = embedding if spec.tied_embeddings else "lm_head.weight"
    tensors = [
        ServedTensor(embedding, (embedding,), _vocabulary),
        ServedTensor("lm_head.weight", (output,), _vocabulary, optional=spec.tied_embeddings),
        ServedTensor("model.norm.weight", ("model.norm.weight",), _whole, replicated=True),
    ]
    for layer in range(spec.num_layers):
        tensors += _layer(spec, layer, mlp_multiple)
    return tensors


def _layer(spec: ModelSpec, layer: int, mlp_multiple: int) -> list[ServedTensor]:
    at = f"model.layers.{layer}."
    qkv = partial(_query_key_value, spec.num_kv_heads)

    def fused(name: str, parts: Sequence[str], kind: str, cut: Cut) -> ServedTensor:
        return ServedTensor(f"{at}{name}.{kind}", tuple(f"{at}{part}.{kind}" for part in parts), cut)

    projections, gated = [f"self_attn.{x}_proj" for x in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
    gate_up = partial(_rows, mlp_multiple)
    if spec.family in FUSED:
        projections, qkv = ["self_attn.qkv_proj"], partial(_within, [spec.query_size, spec.kv_size, spec.kv_size], qkv)
        gated, gate_up = ["mlp.gate_up_proj"], partial(_within, [spec.ffn_hidden_size] * 2, gate_up)
    tensors = [
        fused("self_attn.qkv_proj", projections, "weight", qkv),
        fused("self_attn.o_proj", ["self_attn.o_proj"], "weight", partial(_columns, 1)),
    ]
    if not spec.is_sparse(layer):
        tensors += [
            fused("mlp.gate_up_proj", gated, "weight", gate_up),
            fused("mlp.down_proj", ["mlp.down_proj"], "weight", partial(_columns, mlp_multiple)),
        ]
    if spec.qkv_bias:
        tensors.append(fused("self_attn.qkv_proj", projections, "bias", qkv))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if spec.qk_norm:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    replicated = [*norms, "mlp.gate"] if spec.is_sparse(layer) else norms
    return tensors + [
        ServedTensor(f"{at}{x}.weight", (f"{at}{x}.weight",), _whole, replicated=True) for x in replicated
    ]


def _whole(tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    return list(tensors)


def _within(rows: Sequence[int], cut: Cut, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    """A cut of parts that lie end to end in one tensor."""
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
    return [part if stop - start == held else torch.nn.functional.pad(part, (0, held - (stop - start)))]


def _share(features: int, multiple: int, rank: int, size: int) -> tuple[int, int, int]:
    """How many features a rank holds, padding included, and which of them are real: from, to."""
    held = -(-features // (multiple * size)) * multiple
    start = min(rank * held, features)
    return held, start, min(start + held, features)


def _query_key_value(kv_heads: int, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    """With more ranks than KV heads, neighbouring ranks hold the same one."""
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
