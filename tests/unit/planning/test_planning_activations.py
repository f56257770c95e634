"""What Megatron's layers keep for the backward pass, seen by hooks on saved tensors, is what is planned, within 2%.

The layers are the real ones, on a CPU and a process group of one process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clipo_megatron.config.schema import LayoutConfig, RunConfig
from clipo_megatron.flow import MicroBatch, Sample
from clipo_megatron.planning.activations import Kernels, LayerShape, layer_shape, stage_activations
from clipo_megatron.policy.batch.packing import pack
from clipo_megatron.policy.model.fake_process_group import fake_process_group
from clipo_megatron.policy.model.model import PolicyStage, build_stages, transformer_config
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "vocab_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS = {
    "dense": {"model_type": "llama", **SIZES},
    "grouped queries, biases": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2},
    "norms of heads": {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2},
    "tied head": {"model_type": "llama", **SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "experts": {"model_type": "qwen3_moe", **SIZES, "num_key_value_heads": 2, **EXPERTS},
}
FUSED = {"bias_activation_fusion": True}
SELECTIVE = {**FUSED, "recompute_granularity": "selective"}


@pytest.fixture(autouse=True)
def without_a_compiler() -> Any:
    """Fused SwiGLU runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Kept:
    """The bytes of tensors that autograd saves within it, each memory counted once; parameters and inputs are not."""

    def __init__(self, *known: Tensor):
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, Tensor] = {}  # their memory would be given to the next

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._alive.values())

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._known:
            self._alive.setdefault(place, tensor)
        return tensor


def configuration(layout: LayoutConfig, megatron: dict[str, Any], recompute: bool = False) -> RunConfig:
    config = RunConfig()
    config.layout, config.megatron, config.model.recompute = layout, megatron, recompute
    return config


def built(config: RunConfig, spec: ModelSpec, place: Any) -> PolicyStage:
    made = transformer_config(spec, config.model, place, config.megatron)
    made.use_cpu_initialization = True
    with platform().cuda_tensor_names():
        (stage,) = build_stages(spec, made, place)
    stage.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(std=0.02)
    return stage


def row(tp: int = 1) -> MicroBatch:
    """Prompts of one token, so that nearly every token of the row is a target."""
    samples = [Sample(row, row, torch.zeros(1).long(), torch.arange(255), torch.zeros(255)) for row in range(4)]
    return pack(samples, multiple=tp)


def planned(config: RunConfig, spec: ModelSpec, tokens: int, *, head: bool = True) -> float:
    """What a CPU keeps of all layers, and of the head if asked for, by the plan."""
    division, kernels = ParallelDivision.of(config.layout), Kernels.on_cpus(config.megatron)
    layers = stage_activations(config, spec, division, 0, tokens=tokens, in_flight=1, kernels=kernels)
    return layers + head * 2 * tokens * layer_shape(config, spec, division, kernels).kept_of_head()


def measured(config: RunConfig, spec: ModelSpec, micro: MicroBatch) -> int:
    """What one rank keeps from the tokens to the log-probs; of several tensor-parallel ranks, of the layers alone."""
    with fake_process_group(config.layout, rank=0, world=config.layout.tp) as place:
        stage = built(config, spec, place)
        with Kept(*stage.parameters(), micro.tokens, micro.positions, micro.predict) as kept:
            if place.tp == 1:
                stage.logprobs(stage(micro), micro, temperature=1.0)
                return kept.nbytes
            entry = micro.tokens.numel() // (place.tp if place.sequence_parallel else 1)
            states = torch.zeros(entry, 1, spec.hidden_size, dtype=torch.bfloat16).requires_grad_()
            plan, rotary = stage._segments(micro)
            for layer in stage.decoder.layers:
                states, _ = layer(states, None, rotary_pos_emb=rotary, packed_seq_params=plan)
            return kept.nbytes


@pytest.mark.parametrize("megatron", [FUSED, {}], ids=["fused", "unfused"])
@pytest.mark.parametrize("model", MODELS)
def test_a_stage_keeps_what_is_planned(model: str, megatron: dict[str, Any]) -> None:
    spec, config, micro = model_spec(MODELS[model]), configuration(LayoutConfig(), megatron), row()
    assert measured(config, spec, micro) == pytest.approx(planned(config, spec, micro.tokens.numel()), rel=0.02)


@pytest.mark.parametrize(
    ("model", "module"), [("grouped queries, biases", "mlp"), ("experts", "moe")], ids=["mlp", "moe"]
)
def test_selective_recomputation_keeps_less(model: str, module: str) -> None:
    spec, micro = model_spec(MODELS[model]), row()
    config = configuration(LayoutConfig(), {**SELECTIVE, "recompute_modules": [module]})
    expected = planned(config, spec, micro.tokens.numel())
    assert measured(config, spec, micro) == pytest.approx(expected, rel=0.02)
    assert expected < 0.8 * planned(configuration(LayoutConfig(), FUSED), spec, micro.tokens.numel())


@pytest.mark.parametrize("model", MODELS)
def test_with_recomputation_a_stage_keeps_the_layers_inputs(model: str) -> None:
    """And while one layer is computed again, everything of that layer is there too."""
    spec, config, micro = model_spec(MODELS[model]), configuration(LayoutConfig(), FUSED, recompute=True), row()
    shape = layer_shape(config, spec, ParallelDivision(), Kernels.on_cpus(FUSED))
    one_layer = 2 * micro.tokens.numel() * shape.kept(0)
    kept = measured(config, spec, micro) + one_layer
    assert kept == pytest.approx(planned(config, spec, micro.tokens.numel()), rel=0.02)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("model", ["dense", "norms of heads"])
def test_tensor_parallel_ranks_keep_their_part(model: str, sequence_parallel: bool) -> None:
    """Collectives of the fake process group do nothing, but their results have the right shapes."""
    spec, micro = model_spec(MODELS[model]), row(2)
    config = configuration(LayoutConfig(tp=2, sequence_parallel=sequence_parallel), FUSED)
    expected = planned(config, spec, micro.tokens.numel(), head=False)
    assert measured(config, spec, micro) == pytest.approx(expected, rel=0.02)


def test_kernels_of_gpus_keep_what_they_are_known_to_keep() -> None:
    """A fused norm keeps its input and one number (aten's `_fused_rms_norm`, transformer-engine's norms), SwiGLU three
    times the inner size instead of five, and rotary embeddings of transformer-engine nothing of each layer."""
    spec = model_spec(MODELS["dense"])
    hidden, inner = spec.hidden_size, spec.ffn_hidden_size

    def kept(kernels: Kernels) -> float:
        return LayerShape(spec, ParallelDivision(), False, 2, kernels).kept(0)

    # Two norms with their outputs; the product of which values are a view, queries and keys, output; SwiGLU.
    assert kept(Kernels.on_gpus({})) == 2 * (2 * hidden + 2) + 3 * hidden + 2 * hidden + (hidden + 2 * 8) + 3 * inner
    assert kept(Kernels.on_gpus({"bias_activation_fusion": False})) - kept(Kernels.on_gpus({})) == 2 * inner
    assert kept(Kernels.on_cpus(FUSED)) - kept(Kernels.on_gpus({})) == 2 * 3 * hidden + 4 * spec.head_dim
    fewer = Kernels.on_gpus({"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]})
    assert kept(Kernels.on_gpus({})) - kept(fewer) == 3 * inner + 2 * hidden
