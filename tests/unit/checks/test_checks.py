"""Checks of a configuration: what would fail after minutes of model building is refused at once."""

import json

import pytest
from config_cases import assign, refusal
from model_folders import FACTS

from clipo_megatron.checks.run import check
from clipo_megatron.config.schema import (
    Anchors,
    EngineKind,
    LayoutConfig,
    Level,
    SourceConfig,
)


def test_a_sound_configuration_passes(config):
    check(config)
    check(config, ranks=1)
    check(assign(config, layout__tp=2, layout__pp=3, layout__sequence_parallel=True), ranks=12)


@pytest.mark.parametrize("tp", [1, 2, 4, 6, 12])
def test_tensor_parallel_sizes_that_fit(config, tp):
    check(assign(config, layout__tp=tp))


@pytest.mark.parametrize(
    ("tp", "part"), [(5, "12 attention heads"), (3, "2 key-value heads"), (24, "12 attention heads")]
)
def test_tensor_parallel_sizes_that_do_not(config, tp, part):
    message = str(refusal(assign(config, layout__tp=tp)))
    assert f"layout.tp = {tp}" in message and part in message and "1, 2, 4, 6, 12" in message


EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"layout__ep": 4}, 4),
        ({"layout__ep": 4}, None),
        ({"layout__ep": 2, "layout__pp": 2}, 4),
        ({"layout__tp": 2, "layout__ep": 2, "layout__etp": 1, "layout__sequence_parallel": True}, 2),
        ({"layout__pp": 4, "layout__first_stage_layers": 6, "layout__ep": 2}, 8),
    ],
)
def test_layouts_of_experts_that_fit(config, folder, settings, ranks):
    (folder / "model" / "config.json").write_text(json.dumps(FACTS | EXPERTS))
    check(assign(config, **settings), ranks=ranks)


ROUTED = {"model__replay_routing": True, "rollout__engine": EngineKind.sglang}


@pytest.mark.parametrize(
    ("settings", "experts", "key", "part"),
    [
        ({**ROUTED, "rollout__engine": EngineKind.vllm}, True, "model.replay_routing", "Set rollout.engine to sglang"),
        (ROUTED, False, "model.replay_routing", "has no experts"),
        ({**ROUTED, "megatron": {"moe_router_fusion": True}}, True, "megatron.moe_router_fusion", "Remove it"),
        ({**ROUTED, "megatron": {"recompute_modules": ["moe"]}}, True, "megatron.recompute_modules", "Take moe out"),
    ],
)
def test_routes_that_cannot_be_replayed(config, folder, settings, experts, key, part):
    (folder / "model" / "config.json").write_text(json.dumps(FACTS | (EXPERTS if experts else {})))
    (problem,) = refusal(assign(config, **settings)).problems
    assert problem.key == key and part in str(problem)
    (folder / "model" / "config.json").write_text(json.dumps(FACTS | EXPERTS))
    check(assign(config, **ROUTED, megatron={"recompute_modules": ["mlp"]}))


@pytest.mark.parametrize(
    ("settings", "ranks", "key", "part"),
    [
        ({"layout__ep": 3}, 3, "layout.ep", "Valid for this model: 1, 2, 4, 8"),
        ({"layout__ep": 2}, 1, "layout.ep", "tp * dp = 1 * 1"),
        ({"layout__ep": 2, "layout__dp": 1}, None, "layout.ep", "tp * dp = 1 * 1"),
        ({"layout__ep": 2, "layout__etp": 3}, 6, "layout.etp", "inner size of an expert, 40"),
        ({"layout__ep": 0}, 2, "layout.ep", "at least 1"),
        ({"layout__tp": 2}, 2, "layout.sequence_parallel", "Set it to true"),
    ],
)
def test_layouts_of_experts_that_do_not(config, folder, settings, ranks, key, part):
    (folder / "model" / "config.json").write_text(json.dumps(FACTS | EXPERTS))
    (problem,) = refusal(assign(config, **settings), ranks=ranks).problems
    assert problem.key == key and part in str(problem)


def test_tensor_parallel_size_must_divide_the_intermediate_size(config, folder):
    (folder / "model" / "config.json").write_text(json.dumps({**FACTS, "intermediate_size": 50}))
    assert "intermediate size, 50" in str(refusal(assign(config, layout__tp=4)))


@pytest.mark.parametrize(
    ("settings", "ranks", "key", "part"),
    [
        ({"layout__pp": 4}, None, "layout.pp", "1, 2, 3, 5, 6, 10, 15, 30"),
        ({"layout__ep": 2}, 2, "layout.ep", "no experts"),
        ({"layout__etp": 1}, None, "layout.etp", "Set it to null"),
        ({"layout__first_stage_layers": 2}, None, "layout.first_stage_layers", "one pipeline stage"),
        ({"layout__pp": 3, "layout__first_stage_layers": 5}, None, "layout.first_stage_layers", "leaves 25 of"),
        ({"layout__pp": 2, "layout__last_stage_layers": 0}, None, "layout.last_stage_layers", "at least 1"),
        ({"layout__tp": 0}, None, "layout.tp", "at least 1"),
        ({"layout__sequence_parallel": True}, None, "layout.sequence_parallel", "layout.tp is 1"),
        ({"layout__tp": 2, "layout__pp": 2}, 6, "", "4 or 8 ranks"),
        ({"layout__tp": 2, "layout__dp": 2}, 8, "layout.dp", "Start 4 ranks"),
        ({"layout__dp": 32}, None, "data.prompts_per_step", "32 model replicas"),
        ({"data__prompts_per_step": 15, "algorithm__mini_batches": 4}, None, "data.prompts_per_step", "12 or 16"),
        (
            {"layout__dp": 6, "data__prompts_per_step": 8, "algorithm__mini_batches": 4}
            | {"rollout__samples_per_prompt": 2},
            None,
            "data.prompts_per_step",
            "2 prompts with 2 rollouts each, and not all of the 6 model replicas would get one. Set it to 12 or more",
        ),
        ({"rollout__samples_per_prompt": 1}, None, "rollout.samples_per_prompt", "CLIPO with clipo.level = group"),
        (
            {"rollout__samples_per_prompt": 1, "clipo__level": Level.batch},
            None,
            "rollout.samples_per_prompt",
            "the advantages of grpo are against the prompt's other rollouts",
        ),
        ({"rollout__samples_per_prompt": 0}, None, "rollout.samples_per_prompt", "at least 1"),
        ({"rollout__max_new_tokens": 4000}, None, "rollout.max_new_tokens", "3584 or less"),
        ({"eval__max_new_tokens": 4000}, None, "eval.max_new_tokens", "3584 or less"),
        ({"layout__max_tokens_per_microbatch": 0}, None, "layout.max_tokens_per_microbatch", "at least 1"),
        ({"clipo__temperature": 0.0}, None, "clipo.temperature", "above 0"),
        ({"clipo__weight": -11.0}, None, "clipo.weight", "at least -10"),
        ({"clipo__floor": 0.5}, None, "clipo.floor", "at most 0"),
        ({"clipo__anchors": Anchors.wrong}, None, "clipo.anchors", "correct anchors alone"),
        ({"clipo__warmup_steps": 100}, None, "clipo.warmup_steps", "never give a bonus"),
        ({"algorithm__clip_low": 1.0}, None, "algorithm.clip_low", "below 1"),
        ({"algorithm__clip_high": -0.2}, None, "algorithm.clip_high", "at least 0"),
        ({"algorithm__constant_length": 8}, None, "algorithm.constant_length", "constant"),
        ({"rollout__top_p": 0.0}, None, "rollout.top_p", "above 0"),
        ({"rollout__temperature": float("nan")}, None, "rollout.temperature", "above 0"),
        ({"optimizer__learning_rate": float("inf")}, None, "optimizer.learning_rate", "above 0"),
        ({"optimizer__beta2": 1.0}, None, "optimizer.beta2", "at least 0 and below 1"),
        ({"optimizer__min_learning_rate": 1.0}, None, "optimizer.min_learning_rate", "Lower it"),
        ({"reward__correct_reward": 0.0}, None, "reward.correct_reward", "must earn more"),
        ({"train__steps": 0}, None, "train.steps", "at least 1"),
        ({"name": "a/b"}, None, "name", "slash"),
        ({"data__train": []}, None, "data.train", "nothing to train on"),
        ({"data__train": [SourceConfig()]}, None, "data.train[0]", "neither"),
        ({"data__train": [SourceConfig(path="x.csv")]}, None, "data.train[0].path", "*.parquet or *.jsonl"),
        ({"data__train": [SourceConfig(path="/absent.jsonl")]}, None, "data.train[0].path", "no such file"),
        ({"data__train": [SourceConfig(generator="gcd")]}, None, "data.train[0].size", "no number"),
        ({"data__eval": [SourceConfig(generator="gcd", path="x.jsonl")]}, None, "data.eval[0]", "both"),
        (
            {"data__eval": [SourceConfig(generator="gcd", size=2, options={"seed": 1})]},
            None,
            "data.eval[0].options.seed",
            "data.eval[0].seed",
        ),
        ({"data__eval": [SourceConfig(generator="gcd", size=2)] * 2}, None, "data.eval", "2 sources are called gcd"),
        ({"model__path": "/absent"}, None, "model.path", "no such folder"),
    ],
)
def test_refusals(config, settings, ranks, key, part):
    error = refusal(assign(config, **settings), ranks)
    assert key in [problem.key for problem in error.problems]
    assert part in str(error), error


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda model: (model / "config.json").unlink(), "no config.json"),
        (lambda model: (model / "config.json").write_text("{"), "no valid JSON"),
        (lambda model: (model / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}'), "GPT2LMHeadModel"),
        (lambda model: (model / "model.safetensors").unlink(), "safetensors"),
    ],
)
def test_unusable_model_folders(config, folder, spoil, part):
    spoil(folder / "model")
    error = refusal(config)
    assert part in str(error) and error.problems[0].key == "model.path"


@pytest.mark.parametrize("window", [{}, {"sliding_window": 2047}])
def test_a_sliding_window_that_the_engine_ignores(config, folder, window):
    mistral = {
        **FACTS,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        **window,
    }
    (folder / "model" / "config.json").write_text(json.dumps(mistral))
    config.data.max_prompt_tokens, config.rollout.max_new_tokens = 1000, 1047 if window else 3096
    config.rollout.engine = EngineKind.sglang
    check(config, ranks=1)
    config.rollout.max_new_tokens += 1
    (problem,) = refusal(config, ranks=1).problems
    assert (
        problem.key == "rollout.engine" and f"sliding_window is {window.get('sliding_window', 4096)}" in problem.reason
    )
    config.rollout.engine = EngineKind.vllm
    check(config, ranks=1)
    (folder / "model" / "config.json").write_text(json.dumps({**mistral, "sliding_window": None}))
    config.rollout.engine = EngineKind.sglang
    check(config, ranks=1)


def test_all_problems_come_at_once_and_numbered(config):
    error = refusal(assign(config, layout__tp=5, layout__pp=4, clipo__temperature=-1.0, data__train=[]))
    assert [problem.key for problem in error.problems] == ["layout.tp", "layout.pp", "data.train", "clipo.temperature"]
    assert "4 configuration problems" in str(error) and "  4. clipo.temperature = -1.0" in str(error)


def test_ranks_and_replicas_of_a_layout():
    assert LayoutConfig(tp=2, pp=3).requested_ranks == 6
    assert LayoutConfig(tp=2, pp=3, dp=4).requested_ranks == 24
    assert LayoutConfig(pp=2, ep=4).requested_ranks == 8
    assert LayoutConfig(tp=2, ep=4, etp=1).requested_ranks == 4
    assert LayoutConfig(tp=2, ep=4).requested_ranks == 8
    assert LayoutConfig(tp=2).replicas(8) == 4
    assert LayoutConfig(tp=2).replicas(None) == 1


def test_labels_of_sources():
    assert SourceConfig(path="a/b.jsonl").label == "b"
    assert SourceConfig(generator="gcd").label == "gcd"
    assert SourceConfig(generator="gcd", name="x").label == "x"
