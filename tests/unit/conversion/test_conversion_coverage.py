"""The mapping against the parameters of every rank of TP8 x PP8 (and EP8), for configurations of real 70B models.

Each of the 64 ranks is built as Megatron builds it, on the meta device, in a process group whose other ranks do not
exist. `match` pairs its parameters with the entries of its coordinates. What the ranks of a stage hold is then counted
row by row (column by column where a tensor is cut that way), and transformers says which tensors there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from paths import ARCHITECTURES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.policy.model.fake_process_group import fake_process_group, meta_stages
from clipo_megatron.policy.model.model import PolicyStage
from clipo_megatron.weights.coverage import match
from clipo_megatron.weights.errors import CoverageError
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.mapping import Coordinates, MappingEntry, PipelineStage
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import RowParallel
from clipo_megatron.weights.spec import ModelSpec


@dataclass(frozen=True)
class Release:
    """The published index of a model's weights."""

    file: str
    tensors: int
    nbytes: int  # `total_size`, bf16
    division: ParallelDivision


RELEASES = {
    "Qwen2.5-72B": Release("qwen2.5-72b.json", 963, 145_412_407_296, ParallelDivision(tp=8, pp=8)),
    "Llama-3.1-70B": Release("llama-3.1-70b.json", 723, 141_107_412_992, ParallelDivision(tp=8, pp=8)),
    # 94 layers: 11 on the first and last pipeline ranks, 12 on the six between; the 8 ranks of each divide its experts
    "Qwen3-235B-A22B": Release(
        "qwen3-235b-a22b.json",
        36_945,
        470_187_269_120,
        ParallelDivision(tp=8, pp=8, ep=8, etp=1, first_layers=11, last_layers=11),
    ),
}


def config_of(release: Release) -> dict[str, Any]:
    return json.loads((ARCHITECTURES / release.file).read_text())


@contextmanager
def stage_of(spec: ModelSpec, division: ParallelDivision, rank: int) -> Iterator[PolicyStage]:
    """Build the model chunk of one rank."""
    config = LayoutConfig(
        tp=division.tp,
        pp=division.pp,
        ep=division.ep,
        etp=division.etp,
        first_stage_layers=division.first_layers,
        last_stage_layers=division.last_layers,
    )
    with fake_process_group(config, rank=rank, world=division.tp * division.pp) as layout:
        (stage,) = meta_stages(spec, layout)
        yield stage


class Thin:
    """Stands for a full tensor: one element wide across the divided dimension, and holding the numbers of its rows."""

    def __init__(self, shape: tuple[int, ...], along: int, first: int):
        self.length, self.first = shape[along], first
        numbers = torch.arange(first, first + self.length, dtype=torch.int32)
        thin = [1] * len(shape)
        thin[along] = self.length
        self._numbers = numbers.view(thin)
        self.shape = tuple(thin)

    def __getitem__(self, index: Any) -> Tensor:
        return self._numbers[index]


class Tally:
    """Counts the ranks that hold each row of each Hugging Face tensor, and those that should."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.due: dict[str, int] = {}  # ranks that each row belongs to

    def add(self, entry: MappingEntry, local: tuple[int, ...], at: Coordinates, replicas: int) -> None:
        """Let the entry's sharding divide numbered rows in place of the tensors, for the rank `at`."""
        along = 1 if isinstance(entry.sharding, RowParallel) else 0
        sources, first = [], 1  # 0 is padding
        for shape in entry.shapes:
            sources.append(Thin(shape, along, first))
            first += shape[along]
        size, rank = entry.shard_of(at)
        target = torch.full([n if i == along else 1 for i, n in enumerate(local)], -1, dtype=torch.int32)
        entry.sharding.shard(sources, target, rank=rank, size=size)
        assert bool((target >= 0).all()), f"{entry.megatron[0]} is not filled"
        counts = torch.bincount(target.flatten(), minlength=first).to(torch.int16)
        for tensor, source in zip(entry.hf, sources, strict=True):
            part = counts[source.first : source.first + source.length]
            self.held[tensor.name] = self.held.get(tensor.name, 0) + part
            self.due[tensor.name] = 1 if entry.sharding.sharded else replicas

    def wrong(self) -> list[str]:
        """Return the tensors of which a row is on too few or too many ranks."""
        return [name for name, counts in self.held.items() if not bool((counts == self.due[name]).all())]


Where = Callable[[ParallelDivision, int], Coordinates]


def place(division: ParallelDivision, rank: int) -> Coordinates:
    """Return the coordinates of a global rank; TP changes fastest, and expert parallelism divides a stage's ranks."""
    within = rank % division.tp
    return Coordinates(
        tp=division.tp,
        tp_rank=within,
        ep=division.ep,
        ep_rank=within // division.expert_tp,
        etp=division.expert_tp,
        etp_rank=within % division.expert_tp,
    )


def cover(
    spec: ModelSpec, division: ParallelDivision, *, where: Where = place, mapped: ModelSpec | None = None
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Match every rank's parameters; return the shapes of their tensors, and the tensors that are not held once.

    `mapped` is what the mapping takes the model for, if not for what it is.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    wrong: list[str] = []
    for number, stage in enumerate(division.stages(spec.num_layers)):
        tally = Tally()
        for rank in range(number * division.tp, (number + 1) * division.tp):
            at = where(division, rank)
            with stage_of(spec, division, rank) as built:
                _check_place(built, stage, rank, division)
                assert where is not place or built.layout.coordinates == at
                parameters = dict(built.named_parameters())
            assert {parameter.device.type for parameter in parameters.values()} == {"meta"}
            for name, entry in match(parameters, entries(mapped or spec, stage, at), at):
                tally.add(entry, tuple(parameters[name].shape), at, division.tp)
                shapes |= {tensor.name: tensor.shape for tensor in entry.hf}
        wrong += tally.wrong()
    return shapes, wrong


def _check_place(built: PolicyStage, stage: PipelineStage, rank: int, division: ParallelDivision) -> None:
    assert (built.layout.tp_rank, built.layout.pp_rank) == (rank % division.tp, rank // division.tp)
    assert (built.pre_process, built.post_process) == (stage.first, stage.last)
    # Megatron counts layers from 1, by a calculation of its own
    numbers = [layer.layer_number for layer in built.decoder.layers]
    assert numbers == list(range(stage.offset + 1, stage.offset + stage.layers + 1))


def published_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a release, from the model that transformers builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tensors: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("experts.gate_up_proj"):
            for expert in range(shape[0]):
                for half in ("gate", "up"):
                    at = name.replace("experts.gate_up_proj", f"experts.{expert}.{half}_proj.weight")
                    tensors[at] = (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            for expert in range(shape[0]):
                tensors[name.replace("experts.down_proj", f"experts.{expert}.down_proj.weight")] = shape[1:]
        else:
            tensors[name] = shape
    return tensors


@pytest.mark.parametrize(
    "name",
    ["Qwen2.5-72B", *(pytest.param(name, marks=pytest.mark.full) for name in ("Llama-3.1-70B", "Qwen3-235B-A22B"))],
)
def test_every_rank_of_a_real_release(name: str) -> None:
    release = RELEASES[name]
    config = config_of(release)
    spec = model_spec(config)
    stages = release.division.stages(spec.num_layers)
    assert len(stages) == 8 and sum(stage.layers for stage in stages) == spec.num_layers == config["num_hidden_layers"]
    shapes, wrong = cover(spec, release.division)
    assert wrong == []
    assert shapes == published_tensors(config)
    assert len(shapes) == release.tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) * 2 == release.nbytes


SMALL = {
    "num_hidden_layers": 8,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 101,
}


@pytest.mark.parametrize(("tp", "heads"), [(4, 8), (4, 2), (8, 2)])
def test_a_rank_that_takes_anothers_part_is_noticed(tp: int, heads: int) -> None:
    """The count above notices wrong coordinates, with KV heads for all ranks and with fewer."""
    config = config_of(RELEASES["Qwen2.5-72B"]) | SMALL | {"num_key_value_heads": heads}
    spec, division = model_spec(config), ParallelDivision(tp=tp, pp=2)
    assert cover(spec, division)[1] == []

    def neighbours(division: ParallelDivision, rank: int) -> Coordinates:
        at = place(division, rank)
        return replace(at, tp_rank=at.tp_rank & ~1)

    wrong = cover(spec, division, where=neighbours)[1]
    cut = re.compile(r"embed_tokens|lm_head|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj")
    assert len(wrong) == 2 + 8 * 10
    assert all(cut.search(name) for name in wrong)


def test_a_rank_that_takes_anothers_experts_is_noticed() -> None:
    fewer = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    spec = model_spec(config_of(RELEASES["Qwen3-235B-A22B"]) | SMALL | fewer)
    division = ParallelDivision(tp=4, pp=2, ep=4, etp=1)
    shapes, wrong = cover(spec, division)
    assert wrong == [] and len([name for name in shapes if ".experts." in name]) == 8 * 8 * 3

    def second_as_first(division: ParallelDivision, rank: int) -> Coordinates:
        at = place(division, rank)
        return replace(at, ep_rank=0) if at.ep_rank == 1 else at

    shapes, wrong = cover(spec, division, where=second_as_first)
    held = {int(re.findall(r"experts\.(\d+)", name)[0]) for name in shapes if ".experts." in name}
    twice = {int(re.findall(r"experts\.(\d+)", name)[0]) for name in wrong}
    assert (held, twice, len(wrong)) == ({0, 1, 4, 5, 6, 7}, {0, 1}, 8 * 2 * 3)


def test_a_missing_rule_is_noticed() -> None:
    """A model with biases, against a mapping without: every bias of a rank is named."""
    spec = model_spec(config_of(RELEASES["Qwen2.5-72B"]) | SMALL)
    with pytest.raises(CoverageError) as caught:
        cover(spec, ParallelDivision(tp=2, pp=2), mapped=replace(spec, qkv_bias=False))
    assert caught.value.problems == [
        f"nothing fills parameter decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in range(4)
    ]


# What Transformer Engine's layers call their parameters, from megatron-core's sources.
TE_ATTENTION = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
}
TE_MLP = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
TE_EXPERTS = {"pre_mlp_layernorm.weight", "mlp.router.weight"} | {
    f"mlp.experts.linear_fc{half}.weight{expert}" for half in (1, 2) for expert in range(16)
}
TE_QK_NORM = {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
TE_LAYER = {
    "Qwen2.5-72B": TE_ATTENTION | TE_MLP | {"self_attention.linear_qkv.bias"},
    "Llama-3.1-70B": TE_ATTENTION | TE_MLP,
    "Qwen3-235B-A22B": TE_ATTENTION | TE_QK_NORM | TE_EXPERTS,
}


@pytest.mark.parametrize("name", RELEASES)
def test_names_with_transformer_engine(name: str) -> None:
    """The names that Transformer Engine's layers would have on every rank; its layers cannot be built in tests."""
    division = RELEASES[name].division
    spec = model_spec(config_of(RELEASES[name]))
    for number, stage in enumerate(division.stages(spec.num_layers)):
        ends = {"embedding.word_embeddings.weight"} if stage.first else set()
        ends |= {"decoder.final_layernorm.weight", "output_layer.weight"} if stage.last else set()
        layers = {f"decoder.layers.{layer}.{each}" for layer in range(stage.layers) for each in TE_LAYER[name]}
        for rank in range(number * division.tp, (number + 1) * division.tp):
            found = [entry.megatron[-1] for entry in entries(spec, stage, place(division, rank))]
            assert sorted(found) == sorted(ends | layers)
