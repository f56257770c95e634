"""Plans against what is built: parameters of each rank, bytes of the optimizer; memory and time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ARCHITECTURES
from policy_steps import configuration
from ranks import RankPool
from tiny_models import tiny_llama, tiny_qwen2

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import AlgorithmConfig, DType, EngineKind, LayoutConfig, PluginConfig, RunConfig
from clipo_megatron.planning.hardware import HARDWARE, Assumptions
from clipo_megatron.planning.layouts import LayoutPlan, indistinct, plan_layout, search_layouts
from clipo_megatron.planning.memory import server_memory, trainer_memory
from clipo_megatron.planning.parameters import active_count, rank_count, stage_counts, whole_count
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec, read_config

# Sums of the tensors that the published checkpoints hold.
PUBLISHED = {
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-235b-a22b": 235_093_634_560,
}


def architecture(name: str) -> ModelSpec:
    return model_spec(json.loads((ARCHITECTURES / f"{name}.json").read_text()))


@pytest.fixture(scope="module", params=["tied llama", "qwen2"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    if request.param == "qwen2":
        return tiny_qwen2(path, tied=False, vocab=515)
    return tiny_llama(path, vocab=261, heads=4, kv_heads=2, head_dim=32)


def large_run(name: str) -> RunConfig:
    config = RunConfig()
    config.model.path = name
    config.data.prompts_per_step, config.rollout.samples_per_prompt = 128, 16
    config.rollout.max_new_tokens, config.layout.max_tokens_per_microbatch = 8192, 16384
    config.rollout.colocated = True
    return config


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_models_have_the_parameters_that_were_published(name):
    assert whole_count(architecture(name)).total == PUBLISHED[name]


def test_a_token_passes_through_a_tenth_of_qwen3_235b():
    """The model's name says that 22 B of 235 B are active; the embedding is not counted."""
    assert 21e9 < active_count(architecture("qwen3-235b-a22b")) < 22e9


def held(folder: str, layout_config: LayoutConfig) -> dict[str, int]:
    """Count, on a rank, what its actor holds."""
    config = configuration(folder)
    config.layout = layout_config
    layout = parallel.initialize(config.layout, seed=0)
    actor = PolicyActor(config, layout, needs=build_algorithm(config).needs, total_steps=10)
    masters = sum(
        shard.numel()
        for inner in actor.trainable.optimizer.inner.chained_optimizers
        for group in inner.optimizer.param_groups
        for shard in group["params"]
    )
    return {
        "parameters": sum(parameter.numel() for parameter in actor.stage.parameters()),
        "gradients": sum(buffer.grad_data.numel() for buffer in actor.trainable.model.buffers),
        "masters": masters,
        "pp_rank": layout.pp_rank,
    }


@pytest.mark.parametrize(
    "layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)], ids="{0[0]}x{0[1]}x{0[2]}".format
)
def test_every_rank_holds_what_was_planned(layout, ranks: RankPool, folder: Path):
    tp, pp, dp = layout
    config = LayoutConfig(tp=tp, pp=pp, dp=dp)
    spec, division = model_spec(read_config(folder)), ParallelDivision.of(config)
    found = ranks.run(held, tp * pp * dp, str(folder), config)
    for each in found:
        planned = rank_count(spec, division, each["pp_rank"]).total
        assert each["parameters"] == planned
        assert planned <= each["gradients"] <= planned * 1.02 + 4096, "the buffers are padded a little"
    for stage in range(pp):
        masters = sum(each["masters"] for each in found if each["pp_rank"] == stage)
        assert masters == tp * rank_count(spec, division, stage).total, "dp ranks share the masters out"


# ---------------------------------------------------------------- memory and time


def test_memory_of_a_stage_is_what_the_optimizer_says():
    """Llama-3.1-70B, tp 8 x pp 4 x dp 2, bf16: weights 2 bytes, gradients 4, masters and moments 12 over dp."""
    config, spec = large_run("llama"), architecture("llama-3.1-70b")
    config.layout.tp, config.layout.pp, config.layout.sequence_parallel = 8, 4, True
    stages = trainer_memory(config, spec, ParallelDivision.of(config.layout), 2, Assumptions())
    middle = 20 * (8192 * 8192 * 2 + 2 * 1024 * 8192 + 3 * 28672 * 8192) / 8 + 20 * 2 * 8192
    assert stages[1].weights == 2 * middle and stages[1].gradients == 4 * middle and stages[1].optimizer == 6 * middle
    assert stages[0].weights > stages[1].weights < stages[3].weights, "embedding, output layer"
    assert stages[0].activations > stages[1].activations, "the first stage has most micro-batches in flight"
    assert stages[3].logits > 0 == stages[0].logits and stages[3].head > 0
    config.algorithm.kl.coefficient = 0.01
    assert trainer_memory(config, spec, ParallelDivision.of(config.layout), 2, Assumptions())[1].reference == 2 * middle
    config.model.dtype = DType.fp32
    in_fp32 = trainer_memory(config, spec, ParallelDivision.of(config.layout), 2, Assumptions())[1]
    assert (in_fp32.weights, in_fp32.optimizer) == (4 * middle, 4 * middle)


def test_context_parallelism_divides_tokens_and_optimizer():
    """Of rows that are twice as long, each of two ranks has as much as one had, and half of the masters and moments."""
    config, spec, hardware = large_run("llama"), architecture("llama-3.1-70b"), HARDWARE["h100"]
    config.layout.tp, config.layout.pp, config.layout.sequence_parallel, config.serve.tp = 8, 4, True, 4
    one = plan_layout(config, spec, 2, 64, hardware, Assumptions())
    config.layout.cp, config.layout.max_tokens_per_microbatch = 2, 2 * config.layout.max_tokens_per_microbatch
    two = plan_layout(config, spec, 2, 64, hardware, Assumptions())
    assert (two.trainer_gpus, two.cp) == (2 * one.trainer_gpus, 2) and "layout.cp=2" in two.overrides
    for ours, theirs in zip(two.trainer, one.trainer, strict=True):
        assert (ours.weights, ours.gradients, ours.logits) == (theirs.weights, theirs.gradients, theirs.logits)
        assert ours.optimizer == theirs.optimizer / 2 and ours.activations <= theirs.activations
    assert 0.5 * one.time.score < two.time.score < 0.7 * one.time.score, "keys and values have to be gathered"


def test_methods_cost_what_they_declare():
    """A reference and a critic cost memory, and their forward passes and updates cost time, as multiples of GRPO's."""
    config, spec = large_run("llama"), architecture("llama-3.1-70b")
    config.layout.tp, config.layout.pp, config.serve.tp = 8, 4, 4

    def planned(name: str, *plugins: str, **settings: int) -> LayoutPlan:
        algorithm = AlgorithmConfig(name, plugins=[PluginConfig(each) for each in plugins], **settings)
        return plan_layout(replace(config, algorithm=algorithm), spec, 1, 32, HARDWARE["h100"], Assumptions())

    def times(plan: LayoutPlan, of: LayoutPlan) -> tuple[float, float]:
        return pytest.approx((plan.time.score / of.time.score, plan.time.update / of.time.update))

    grpo = planned("grpo")
    assert times(planned("grpo", "cepo", "papo", "hapo"), grpo) == (4, 1)
    assert times(planned("grpo", "pipo"), grpo) == (1, 2)
    assert times(planned("ppo"), grpo) == (2, 2)
    assert times(planned("copg"), grpo) == (2, 1)
    assert times(planned("mine.py:Own", "other.py:Own"), grpo) == (1, 1)
    # The forward passes of the scores are a third of an update's three passes, less its other costs.
    again = planned("copg", mini_batches=4).time.update / planned("grpo", mini_batches=4).time.update
    assert again == pytest.approx(1 + (3 / 4) / 3, rel=0.02)
    weights = [memory.weights for memory in grpo.trainer]
    assert [memory.reference for memory in planned("copg").trainer] == weights
    assert not any(memory.reference or memory.critic for memory in grpo.trainer)


def test_a_critic_is_of_its_own_models_size():
    config, spec, small = large_run("llama"), architecture("llama-3.1-70b"), architecture("qwen2.5-72b")
    small = replace(small, num_layers=40)
    config.layout.tp, config.layout.pp, config.serve.tp, config.algorithm.name = 8, 4, 4, "ppo"
    like, other = (
        plan_layout(config, spec, 2, 64, HARDWARE["h100"], Assumptions(), critic=each) for each in (None, small)
    )
    ratio = stage_counts(small, like.division)[1].total / stage_counts(spec, like.division)[1].total
    assert 0.4 < ratio < 0.6
    assert other.trainer[1].critic / like.trainer[1].critic == pytest.approx(ratio, rel=1e-3)
    assert other.trainer[1].weights == like.trainer[1].weights
    assert 0.7 < other.time.update / like.time.update < 0.8 and 0.7 < other.time.score / like.time.score < 0.8


def test_a_server_holds_as_many_sequences_as_its_cache():
    memory = server_memory(architecture("llama-3.1-70b"), 4, HARDWARE["h100"], Assumptions())
    assert memory.cache_per_token == 2 * 80 * 2 * 128 * 2  # keys and values, layers, heads a GPU, head, bytes
    assert memory.cache == pytest.approx(0.85 * 80e9 - 2 * PUBLISHED["llama-3.1-70b"] / 4 - 3e9)
    assert memory.sequences(8192) == int(memory.cache // (8192 * memory.cache_per_token)) > 10
    assert server_memory(architecture("llama-3.1-70b"), 1, HARDWARE["h100"], Assumptions()).sequences(10) == 0


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("gpus", [64, 256, 1024])
def test_layouts_fit_and_the_settings_ask_for_them(name, gpus):
    config, spec, hardware = large_run(name), architecture(name), HARDWARE["h200"]
    found = search_layouts(config, spec, gpus, hardware, Assumptions())
    assert found, "no layout"
    alike = indistinct(found, Assumptions())
    fast, others = found[: len(alike)], found[len(alike) :]
    assert {id(each) for each in fast} == {id(each) for each in alike}
    assert [each.division.pp for each in fast] == sorted(each.division.pp for each in fast)
    assert [each.time.total for each in others] == sorted(each.time.total for each in others)
    for each in found:
        assert each.gpus == gpus and max(memory.total for memory in each.trainer) <= 0.92 * hardware.memory_bytes
        again = as_configured(config, spec, each)
        assert again.fits and again.time == each.time and again.trainer == each.trainer


def as_configured(config: RunConfig, spec: ModelSpec, plan: LayoutPlan) -> LayoutPlan:
    """Return the layout that a plan's settings ask for."""
    values = dict(each.split("=") for each in plan.overrides)
    names = {"tp", "cp", "pp", "dp", "ep", "etp", "first_stage_layers", "last_stage_layers"}
    numbers = {name: int(values[f"layout.{name}"]) for name in names if f"layout.{name}" in values}
    layout = replace(config.layout, **numbers, sequence_parallel=values["layout.sequence_parallel"] == "true")
    model = replace(config.model, recompute=values["model.recompute"] == "true")
    config = replace(config, layout=layout, model=model, serve=replace(config.serve, tp=int(values["serve.tp"])))
    return plan_layout(config, spec, layout.dp, plan.server_gpus, plan.hardware, Assumptions())


def test_a_colocated_trainer_keeps_its_weights_beside_the_servers():
    """An 8B on GPUs of 24 GB: the server alone would fit, and does not beside the weights that it is updated from."""
    config, spec = large_run("llama"), small_llama()
    config.data.max_prompt_tokens, config.rollout.max_new_tokens = 256, 1024
    config.layout.max_tokens_per_microbatch, config.layout.tp, config.serve.tp = 2048, 8, 1
    hardware = replace(HARDWARE["a100"], memory_bytes=24e9)
    beside = plan_layout(config, spec, 2, 16, hardware, Assumptions())
    config.rollout.colocated = False
    alone = plan_layout(config, spec, 2, 16, hardware, Assumptions())
    assert alone.fits and alone.server.trainer == 0
    (stage,) = beside.trainer
    assert beside.server.trainer == stage.weights + stage.head + stage.reserve > 5e9
    used = beside.server.weights + beside.server.reserve + beside.server.trainer
    assert used > 0.92 * 24e9 and not beside.fits
    (problem,) = beside.problems
    assert problem.startswith("a server on 1 GPUs has 0.0 GB for its cache")
    assert stage.others == 3e9 and alone.trainer[0].others == 0, "a server that sleeps keeps its process"


def test_servers_take_no_more_than_the_trainer_leaves():
    config, spec = large_run("llama"), small_llama()
    config.layout = LayoutConfig(tp=4, sequence_parallel=True)
    config.rollout.engine = EngineKind.sglang

    def planned(share: float) -> LayoutPlan:
        config.sglang = {"mem_fraction_static": share}
        return plan_layout(config, spec, 2, 8, HARDWARE["h100"], Assumptions())

    (problem,) = planned(0.85).problems
    assert re.match(r"sglang.mem_fraction_static = 0.85 takes 68.0 GB of a GPU of which the trainer keeps", problem)
    most = float(re.search(r"at most (0\.\d\d) fits", problem)[1])
    fitting = planned(most)
    assert fitting.fits and f"sglang.mem_fraction_static={most}" in fitting.overrides
    assert planned(most - 0.1).server.cache == pytest.approx(fitting.server.cache - 8e9)
    assert not planned(most + 0.01).fits


def small_llama() -> ModelSpec:
    return replace(architecture("llama-3.1-70b"), num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32)


def test_the_host_holds_snapshots_and_what_is_offloaded():
    config, spec = large_run("llama"), small_llama()
    config.layout, config.serve.tp = LayoutConfig(tp=4, sequence_parallel=True), 4
    (stage,), host = (plan := plan_layout(config, spec, 2, 8, HARDWARE["h100"], Assumptions())).trainer, plan.host
    assert host.snapshots == 8 * (stage.weights + stage.optimizer)
    assert host.offloaded == 8 * stage.optimizer, "gradients are freed, and weights stay"
    config.checkpoint.asynchronous, config.rollout.colocated = False, False
    config.algorithm.name = "ppo"
    without = plan_layout(config, spec, 2, 8, HARDWARE["h100"], Assumptions()).host
    assert without.snapshots == without.offloaded == 0
    config.checkpoint.asynchronous, config.rollout.colocated = True, True
    (stage,), host = (plan := plan_layout(config, spec, 2, 8, HARDWARE["h100"], Assumptions())).trainer, plan.host
    assert stage.critic_state == pytest.approx(stage.critic - 2 * stage.weights, rel=0.1), "all but its gradients"
    assert host.offloaded == 8 * (stage.optimizer + stage.critic_state)
    small = replace(HARDWARE["h100"], host_bytes=200e9)
    (problem,) = plan_layout(config, spec, 2, 8, small, Assumptions()).problems
    assert "the ranks of a node need" in problem and "of its host's 180 GB" in problem


def test_a_row_is_as_long_as_the_longest_rollout():
    config, spec = large_run("llama"), architecture("llama-3.1-70b")
    config.layout.tp, config.serve.tp = 8, 8

    def activations(most: int, longest: int) -> float:
        config.layout.max_tokens_per_microbatch, config.rollout.max_new_tokens = most, longest - 512
        config.data.max_prompt_tokens = 512
        return plan_layout(config, spec, 8, 64, HARDWARE["h100"], Assumptions()).trainer[0].activations

    assert activations(8192, 65536) == activations(65536, 65536) == pytest.approx(8 * activations(8192, 8192))


def test_transfers_between_stages_cost_time():
    config, spec, hardware = large_run("llama"), architecture("llama-3.1-70b"), HARDWARE["h100"]
    config.layout.tp, config.layout.pp, config.serve.tp = 8, 4, 4

    def update(**changed: float) -> float:
        return plan_layout(config, spec, 2, 64, replace(hardware, **changed), Assumptions()).time.update

    fast, slow = update(network_bytes_per_s=1e15), update(network_bytes_per_s=1e9)
    rows = 128 * 16 * (512 + 4096) / 2 / 16384 / 2 * 2  # micro-batches of a replica; mean lengths are half the longest
    sent = 2 * 16384 * 8192 * 2  # bytes of a row, there and back
    assert slow - fast > rows * sent / 0.6e9 * 0.9


def test_an_embedding_costs_the_first_stage_time():
    config, spec, hardware = large_run("llama"), architecture("llama-3.1-70b"), HARDWARE["h100"]
    config.layout.tp, config.serve.tp = 8, 8
    slow = replace(hardware, memory_bytes_per_s=hardware.memory_bytes_per_s / 100)
    one, other = (plan_layout(config, spec, 8, 64, each, Assumptions()).time for each in (hardware, slow))
    assert other.update > one.update and other.score == one.score


def test_gradients_are_reduced_beside_the_backward_pass():
    """What remains is the gathering of new weights; without a backward pass as long, their reduction remains too."""
    config, spec, hardware = large_run("llama"), architecture("llama-3.1-70b"), HARDWARE["h100"]
    config.layout.tp, config.serve.tp = 8, 8

    def communicated() -> float:
        times = (plan_layout(config, spec, 8, 64, each, Assumptions()).time.update for each in (hardware, fast))
        return next(times) - next(times)

    fast = replace(hardware, network_bytes_per_s=1e15)
    gathered = 2 * rank_count(spec, ParallelDivision(tp=8), 0).total * 7 / 8 / (0.6 * 50e9)
    assert communicated() == pytest.approx(gathered, rel=0.01)
    config.layout.max_tokens_per_microbatch = 512
    assert 2 * gathered < communicated() < 3 * gathered


def test_what_does_not_fit_says_so():
    config, spec = large_run("llama"), architecture("llama-3.1-70b")
    config.serve.tp = 1
    plan = plan_layout(config, spec, 8, 8, HARDWARE["h100"], Assumptions())
    assert not plan.fits
    assert re.match(
        r"stage 0 of the trainer needs [\d.]+ GB of 73.6 GB \(activations alone [\d.]+ GB\)", plan.problems[0]
    )
    assert re.match(r"the ranks of a node need \d+ GB of its host's 1800 GB", plan.problems[1])
    assert "a server on 1 GPUs has 0.0 GB for its cache" in plan.problems[2]


def test_time_follows_tokens_and_gpus():
    config, spec, hardware = large_run("llama"), architecture("llama-3.1-70b"), HARDWARE["h100"]
    config.layout.tp, config.layout.pp, config.serve.tp = 8, 4, 4
    one = plan_layout(config, spec, 2, 64, hardware, Assumptions()).time
    wider = plan_layout(config, spec, 4, 128, hardware, Assumptions()).time
    assert wider.update < one.update < 2.1 * wider.update and wider.generate < one.generate
    config.model.recompute = True
    assert plan_layout(config, spec, 2, 64, hardware, Assumptions()).time.update == pytest.approx(
        one.update * 4 / 3, rel=0.05
    )
    config.data.prompts_per_step *= 2
    assert plan_layout(config, spec, 2, 64, hardware, Assumptions()).time.tokens == 2 * one.tokens
