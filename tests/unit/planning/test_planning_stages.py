"""The time of a pipeline is that of its slowest stage, which is often the one with the output layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.hardware import HARDWARE, Assumptions
from clipo_megatron.planning.layouts import indistinct, plan_layout, search_layouts
from clipo_megatron.planning.memory import output_layer_flops
from clipo_megatron.planning.timing import stage_seconds
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec, read_config_file

ARCHITECTURES = ROOT / "examples" / "recipes" / "architectures"
H100, ASSUMED = HARDWARE["h100"], Assumptions()


def architecture(name: str) -> ModelSpec:
    return model_spec(read_config_file(Path(ARCHITECTURES / f"{name}.json")))


@pytest.fixture
def config() -> RunConfig:
    config = RunConfig()
    config.data.prompts_per_step, config.rollout.samples_per_prompt = 128, 16
    config.rollout.max_new_tokens, config.layout.max_tokens_per_microbatch = 4096, 8192
    config.rollout.colocated = True
    return config


def seconds(config: RunConfig, spec: ModelSpec, division: ParallelDivision, dp: int = 1) -> list[float]:
    return stage_seconds(config, spec, division, dp, H100, ASSUMED)


def test_the_last_stage_has_the_output_layer_beside_its_layers(config):
    spec = architecture("Llama-3.1-8B-Instruct")
    *others, last = seconds(config, spec, ParallelDivision(pp=32))
    assert others == pytest.approx([others[0]] * 31)
    # 128,256 rows of 4,096 features against a layer's 218 million parameters
    assert 2.5 < last / others[0] < 3.7
    assert output_layer_flops(spec) == 2 * 128_256 * 4_096


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_stages_together_compute_the_whole_model(config, pp):
    spec = architecture("Qwen2.5-7B-Instruct")
    whole = sum(seconds(config, spec, ParallelDivision(pp=1)))
    division = (
        ParallelDivision(pp=pp) if spec.num_layers % pp == 0 else ParallelDivision(pp=pp, first_layers=2, last_layers=2)
    )
    assert sum(seconds(config, spec, division)) == pytest.approx(whole)


def test_a_last_stage_with_fewer_layers_makes_a_step_shorter(config):
    spec = architecture("Llama-3.1-8B-Instruct")
    even = ParallelDivision(pp=4)
    uneven = ParallelDivision(pp=4, first_layers=9, last_layers=5)

    def update(division: ParallelDivision) -> float:
        return plan_layout(config, spec, 8, 32, H100, ASSUMED, division=division).time.update

    assert max(seconds(config, spec, uneven)) < max(seconds(config, spec, even))
    assert update(uneven) < update(even)


def test_of_layouts_alike_the_one_with_least_pipeline_is_recommended(config):
    """Llama-3.1-8B on 32 GPUs, which were once planned as a pipeline of 32 stages."""
    found = search_layouts(config, architecture("Llama-3.1-8B-Instruct"), 32, H100, ASSUMED)
    alike = indistinct(found, ASSUMED)
    assert found[0].division.pp == 1 < max(each.division.pp for each in alike)
    shortest = min(each.time.total for each in found)
    assert found[0].time.total <= shortest * 1.1
    deepest = max(found, key=lambda each: each.division.pp)
    assert deepest.division.pp > 1 and deepest.time.total > found[0].time.total


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-3B-Instruct"])
@pytest.mark.parametrize("gpus", [16, 32, 64])
def test_no_pipeline_of_a_layer_a_stage_is_recommended(config, name, gpus):
    spec = architecture(name)
    best = search_layouts(config, spec, gpus, H100, ASSUMED)[0]
    assert best.division.pp <= 4, best.overrides
    stages = seconds(config, spec, best.division, best.dp)
    assert max(stages) < 1.5 * sum(stages) / len(stages), "the slowest stage sets the pace of the others"


def test_experts_count_with_their_layers(config):
    spec = architecture("Qwen3-30B-A3B")
    *others, last = seconds(config, spec, ParallelDivision(pp=8, ep=8, etp=1))
    dense = replace(spec, experts=None)
    assert last > others[0] > seconds(config, dense, ParallelDivision(pp=8))[0] * 0.1
