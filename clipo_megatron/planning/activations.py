"""What a pipeline stage keeps of a forward pass for the backward pass: the tensors that autograd saves, part by part.

Counted in values of a token: the number of elements of the model's dtype that one rank keeps for each token of a
micro-batch. Tests compare them with what hooks on saved tensors see of Megatron's own layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipo_megatron.config.schema import DType, RunConfig
from clipo_megatron.planning.parameters import stage_chunks
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec

WIDTH = {DType.bf16: 2, DType.fp32: 4}  # bytes of a value
FP32, INT64 = 4, 8  # bytes


@dataclass(frozen=True, slots=True)
class Kernels:
    """How layers are computed, as far as it decides what they keep."""

    fused_swiglu: bool = True  # gate and up are kept, and not what is made of them before the last product
    fused_rope: bool = True  # sines and cosines are kept once for all layers
    fused_norm: bool = True  # a norm's input is kept, and not two copies in fp32
    router_in_fp32: bool = False  # a router keeps a copy of its input in fp32
    recomputed: frozenset[str] = frozenset()  # parts of a layer that are computed again: "mlp", "moe", "layernorm"

    @classmethod
    def on_gpus(cls, megatron: Mapping[str, Any]) -> Kernels:
        """Those of GPUs with transformer-engine, changed by the section `megatron` of a configuration."""
        return cls(
            fused_swiglu=megatron.get("bias_activation_fusion", True) is not False,
            fused_rope=megatron.get("apply_rope_fusion", True) is not False,
            recomputed=_recomputed(megatron),
        )

    @classmethod
    def on_cpus(cls, megatron: Mapping[str, Any]) -> Kernels:
        """Those of CPUs."""
        return cls(
            fused_swiglu=megatron.get("bias_activation_fusion") is True,
            fused_rope=False,
            fused_norm=False,
            router_in_fp32=True,
            recomputed=_recomputed(megatron),
        )


def _recomputed(megatron: Mapping[str, Any]) -> frozenset[str]:
    if megatron.get("recompute_granularity") != "selective":
        return frozenset()
    return frozenset(megatron.get("recompute_modules") or ())


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A model's layers on one rank, and what each kind keeps."""

    spec: ModelSpec
    division: ParallelDivision
    sequence_parallel: bool
    width: int  # bytes of a value
    kernels: Kernels

    @property
    def entry(self) -> float:
        """The state with which a token enters a layer, on one rank."""
        return self.spec.hidden_size / self._shared

    @property
    def _shared(self) -> int:
        """Ranks that divide what tensor parallelism alone would not."""
        return self.division.tp if self.sequence_parallel else 1

    def kept(self, layer: int) -> float:
        """Values of a token that a layer keeps."""
        return self._attention() + (self._experts() if self.spec.is_sparse(layer) else self._mlp())

    def kept_of_head(self) -> float:
        """Values of a token that the last stage keeps for its log-prob beside the layers', if it is a target.

        They are what the final norm keeps, the token's state, which every tensor-parallel rank has whole, its number
        and its log-sum-exp.
        """
        return self._norm(self.entry, 1 / self._shared) + self.spec.hidden_size + (INT64 + FP32) / self.width

    def _norm(self, size: float, count: float) -> float:
        """What norms over `size` values keep of their input: with `count` statistics in fp32, one for each norm."""
        inputs = size if self.kernels.fused_norm else 2 * size * FP32 / self.width
        return inputs + count * FP32 / self.width

    def _normed(self) -> float:
        """What the norm before a part of the layer keeps, with its output, which the part's first product keeps."""
        outputs = 0.0 if "layernorm" in self.kernels.recomputed else self.entry
        return self._norm(self.entry, 1 / self._shared) + outputs

    def _attention(self) -> float:
        spec, tp = self.spec, self.division.tp
        heads, kv_heads = spec.num_heads / tp, max(1.0, spec.num_kv_heads / tp)
        query, kv = heads * spec.head_dim, kv_heads * spec.head_dim
        product = query + 2 * kv  # of which the values are a view
        rotated = query + kv
        output = query + heads * FP32 / self.width  # and the log-sum-exp of each head
        norms = 0.0
        if spec.qk_norm:
            # The fused one keeps the queries, which are a copy, and the keys as a part of the product.
            norms = self._norm(query if self.kernels.fused_norm else rotated, heads + kv_heads)
        rope = 0.0 if self.kernels.fused_rope else 4 * spec.head_dim  # cosines and sines, for queries and for keys
        return self._normed() + product + norms + rotated + rope + output

    def _mlp(self) -> float:
        if "mlp" in self.kernels.recomputed:
            return self._normed()
        # Gate and up, and their product; unfused also the activated gate and a copy of up.
        return self._normed() + (3 if self.kernels.fused_swiglu else 5) * self.spec.ffn_hidden_size / self.division.tp

    def _experts(self) -> float:
        """A rank keeps a copy of its tokens for each expert that they are sent to, and what these make of it."""
        experts = self.spec.experts
        if "moe" in self.kernels.recomputed:
            return self._normed()
        chosen = experts.per_token
        # Unfused also the activated gate, a copy of up, and their product before it is weighted.
        inner = (3 if self.kernels.fused_swiglu else 6) * experts.ffn_hidden_size / self.division.expert_tp
        copies = chosen * (self.spec.hidden_size + inner) / self._shared
        # Numbers of the experts and of the copies, probabilities and weights; and of all experts a mark and a number.
        routing = (chosen * 2 * (INT64 + FP32) + experts.count * (1 + FP32)) / self.width / self._shared
        normed = self._norm(self.entry, 1 / self._shared)
        router = self.entry * (FP32 / self.width if self.kernels.router_in_fp32 else 1)
        return normed + router + routing + copies


def layer_shape(
    config: RunConfig, spec: ModelSpec, division: ParallelDivision, kernels: Kernels | None = None
) -> LayerShape:
    """The layers of a configuration on one rank; `kernels` None: those of GPUs."""
    kernels = kernels or Kernels.on_gpus(config.megatron)
    return LayerShape(spec, division, config.layout.sequence_parallel, WIDTH[config.model.dtype], kernels)


def stage_activations(
    config: RunConfig,
    spec: ModelSpec,
    division: ParallelDivision,
    stage: int,
    *,
    tokens: int,
    in_flight: int,
    kernels: Kernels | None = None,
) -> float:
    """Compute the bytes that one rank of a stage keeps of `in_flight` micro-batches of `tokens` tokens.

    With `model.recompute` each layer keeps its input, and one layer of one micro-batch at a time keeps everything else.
    `kernels` None: those of GPUs.
    """
    width = WIDTH[config.model.dtype]
    shape = layer_shape(config, spec, division, kernels)
    layers = [
        layer
        for chunk in stage_chunks(spec.num_layers, division)[stage]
        for layer in range(chunk.offset, chunk.offset + chunk.layers)
    ]
    if config.model.recompute:
        whole = max((shape.kept(layer) for layer in layers), default=0.0)
        return width * tokens * (in_flight * shape.entry * len(layers) + whole)
    return width * tokens * in_flight * sum(shape.kept(layer) for layer in layers)
