"""Checks of a configuration: what would fail after minutes of model building is refused at once."""

import json
import time

import pytest
from model_folders import FACTS, model_folder

from clipo_megatron.checks.rollout import transport_of
from clipo_megatron.checks.run import check
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import (
    Anchors,
    CorrectionKind,
    DataConfig,
    EngineKind,
    LayoutConfig,
    Level,
    ModelConfig,
    RunConfig,
    SourceConfig,
    Transport,
    Unfinished,
)


@pytest.fixture
def folder(tmp_path):
    model_folder(tmp_path / "model", FACTS)
    (tmp_path / "train.jsonl").touch()
    return tmp_path


@pytest.fixture
def config(folder):
    source = SourceConfig(path=str(folder / "train.jsonl"))
    return RunConfig(model=ModelConfig(path=str(folder / "model")), data=DataConfig(train=[source]))


def assign(config, **settings):
    for key, value in settings.items():
        place = config
        *sections, name = key.split("__")
        for section in sections:
            place = getattr(place, section)
        assert hasattr(place, name), key
        setattr(place, name, value)
    return config


def refusal(config, ranks=None):
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        check(config, ranks=ranks)
    assert time.process_time() - started < 1
    return caught.value


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


# ---------------------------------------------------------------- engines, servers, what a step asks for

SGLANG, VLLM = {"rollout__engine": EngineKind.sglang}, {"rollout__engine": EngineKind.vllm}
MASK = {"algorithm__correction__kind": CorrectionKind.mask}
HERE, ELSEWHERE = "http://127.0.0.1:30000", "http://node7:30000"
SOUND = [
    {},
    {**SGLANG, "rollout__endpoints": [HERE, "https://[::1]:9", "http://localhost:30001/"]},
    {**SGLANG, "rollout__sync__transport": Transport.ipc, "rollout__colocated": True},
    {**SGLANG, "rollout__sync__transport": Transport.disk, "rollout__colocated": True},
    {**SGLANG, "rollout__sync__transport": Transport.disk, "rollout__top_p": 0.9, "rollout__router": HERE},
    {**SGLANG, "rollout__over_sampling": 1.5, "rollout__unfinished": Unfinished.keep_running},
    {**SGLANG, "rollout__over_sampling": 1.5, "rollout__unfinished": Unfinished.resume, "rollout__colocated": True},
    {**VLLM, "rollout__over_sampling": 1.5, "rollout__max_refill_rounds": 4},
    {**VLLM, "rollout__over_sampling": 2.0, "rollout__unfinished": Unfinished.keep_running},
    {**SGLANG, "rollout__ahead": 1, "rollout__max_refill_rounds": 4},
    {**VLLM, "rollout__ahead": 1},
    {**SGLANG, "rollout__sync__delta": True},
    {**VLLM, "rollout__sync__delta": True},
    {**SGLANG, "rollout__ahead": 1, "rollout__unfinished": Unfinished.keep_running},
    {"rollout__ahead": 1},
    {"rollout__over_sampling": 2.0, "rollout__unfinished": Unfinished.resume},
    {**SGLANG, "rollout__ahead": 1, "rollout__unfinished": Unfinished.keep_running, "rollout__over_sampling": 2.0},
    {**VLLM, "rollout__top_p": 0.9, "rollout__top_k": 20},
    {"rollout__over_sampling": 2.0, "rollout__max_refill_rounds": 3},
    {**MASK, "algorithm__correction__floor": 0.5, "algorithm__correction__cap": 5.0},
    {"algorithm__correction__kind": CorrectionKind.truncate},
    {"serve__servers": 2, "serve__port": 65534},
]


@pytest.mark.parametrize("settings", SOUND)
def test_sound_ways_to_get_rollouts(config, settings, monkeypatch):
    monkeypatch.delenv("CLIPO_API_KEY", raising=False)
    check(assign(config, **settings), ranks=2)


@pytest.mark.parametrize(
    ("settings", "key", "part"),
    [
        ({"rollout__sync__transport": Transport.broadcast}, "rollout.sync.transport", "Set it to in_process"),
        ({**SGLANG, "rollout__sync__transport": Transport.in_process}, "rollout.sync.transport", "broadcast or disk"),
        ({**VLLM, "rollout__sync__transport": Transport.in_process}, "rollout.sync.transport", "Set it to disk"),
        ({**VLLM, "rollout__sync__transport": Transport.ipc}, "rollout.sync.transport", "rollout.colocated=true"),
        ({**SGLANG, "rollout__sync__transport": Transport.ipc}, "rollout.sync.transport", "rollout.colocated=true"),
        (
            {**SGLANG, "rollout__sync__transport": Transport.broadcast, "rollout__colocated": True},
            "rollout.sync.transport",
            "Set it to ipc",
        ),
        ({"rollout__colocated": True}, "rollout.colocated", "in the training processes"),
        ({"rollout__sync__delta": True}, "rollout.sync.delta", "Set it to false"),
        (
            {**SGLANG, "rollout__colocated": True, "rollout__over_sampling": 2.0}
            | {"rollout__unfinished": Unfinished.keep_running},
            "rollout.unfinished",
            "give their memory back",
        ),
        ({**SGLANG, "rollout__unfinished": Unfinished.resume}, "rollout.unfinished", "nothing is ever unfinished"),
        (
            {**SGLANG, "rollout__ahead": 1, "algorithm__correction__floor": 0.5},
            "algorithm.correction.floor",
            "truncated at the cap alone",
        ),
        ({**SGLANG, "rollout__ahead": 1, "rollout__colocated": True}, "rollout.ahead", "GPUs of their own"),
        (
            {**SGLANG, "rollout__ahead": 1, "rollout__unfinished": Unfinished.resume},
            "rollout.unfinished",
            "keep running while",
        ),
        ({**SGLANG, "rollout__ahead": 2, "rollout__over_sampling": 1.5}, "rollout.unfinished", "drops none"),
        (
            {**SGLANG, "rollout__ahead": 1, "rollout__over_sampling": 2.5}
            | {"rollout__unfinished": Unfinished.keep_running},
            "rollout.over_sampling",
            "at most 2 times",
        ),
        ({"rollout__ahead": -1}, "rollout.ahead", "from 0 to 64"),
        ({"rollout__over_sampling": 0.9}, "rollout.over_sampling", "at least 1"),
        ({"rollout__over_sampling": float("inf")}, "rollout.over_sampling", "1.2 to 2"),
        ({"rollout__max_refill_rounds": -1}, "rollout.max_refill_rounds", "at least 0"),
        (
            {"rollout__max_refill_rounds": 2, "rollout__samples_per_prompt": 1},
            "rollout.samples_per_prompt",
            "group of one",
        ),
        ({"rollout__endpoints": [HERE]}, "rollout.endpoints", "asks no server"),
        ({"rollout__router": HERE}, "rollout.router", "asks no server"),
        ({**SGLANG, "rollout__endpoints": ["node7:30000"]}, "rollout.endpoints[0]", "no http or https URL"),
        ({**SGLANG, "rollout__endpoints": [HERE, "http://:3"]}, "rollout.endpoints[1]", "no http or https URL"),
        ({**SGLANG, "rollout__endpoints": ["http://127.0.0.1:99999"]}, "rollout.endpoints[0]", "http://127.0.0.1"),
        ({**SGLANG, "rollout__endpoints": [HERE + "/v1"]}, "rollout.endpoints[0]", "without a path"),
        ({**SGLANG, "rollout__router": "localhost"}, "rollout.router", "no http or https URL"),
        ({**SGLANG, "rollout__endpoints": [HERE, HERE + "/"]}, "rollout.endpoints", "listed 2 times"),
        ({**SGLANG, "rollout__endpoints": [ELSEWHERE]}, "rollout.endpoints[0]", "CLIPO_API_KEY"),
        ({**SGLANG, "rollout__endpoints": [ELSEWHERE]}, "rollout.sync.host", "cannot reach the trainer"),
        ({**SGLANG, "rollout__router": "https://10.0.0.7:1"}, "rollout.router", "CLIPO_API_KEY"),
        ({**VLLM, "serve__host": "0.0.0.0", "rollout__api_key_env": "MY_KEY"}, "serve.host", "MY_KEY"),
        ({"rollout__top_k": 1025}, "rollout.top_k", "from 0 to 1024"),
        ({"rollout__deadline_s": 2700.0}, "layout.distributed_timeout_s", "rollout.deadline_s = 2700"),
        ({**SGLANG, "rollout__sync__deadline_s": 1900.0}, "layout.distributed_timeout_s", "900 + 1900 = 2800"),
        ({"rollout__pool__request_deadline_s": 0.0}, "rollout.pool.request_deadline_s", "above 0"),
        ({"rollout__pool__join_deadline_s": -1.0}, "rollout.pool.join_deadline_s", "above 0"),
        ({"rollout__pool__concurrency": 0}, "rollout.pool.concurrency", "from 1 to 100000"),
        ({"rollout__pool__attempts": 0}, "rollout.pool.attempts", "at least 1"),
        ({"rollout__pool__backoff_s": -0.1}, "rollout.pool.backoff_s", "at least 0"),
        ({"rollout__servers": 0}, "rollout.servers", "at least 1"),
        ({"rollout__sync__deadline_s": 0.0}, "rollout.sync.deadline_s", "above 0"),
        ({"rollout__sync__bucket_mb": 0}, "rollout.sync.bucket_mb", "at least 1"),
        ({"rollout__sync__verify_every": -1}, "rollout.sync.verify_every", "at least 0"),
        ({"serve__servers": 0}, "serve.servers", "at least 1"),
        ({"serve__tp": 0}, "serve.tp", "at least 1"),
        ({"serve__port": -1}, "serve.port", "65535"),
        ({"serve__port": 65534, "serve__servers": 3}, "serve.port", "65535"),
        ({"serve__max_restarts": -1}, "serve.max_restarts", "at least 0"),
        ({"serve__health_timeout_s": float("nan")}, "serve.health_timeout_s", "above 0"),
        ({"report__rollout_kl_alarm": 0.0}, "report.rollout_kl_alarm", "above 0"),
        ({**MASK, "algorithm__correction__cap": 0.5}, "algorithm.correction.cap", "from 1 to 100000000"),
        ({**MASK, "algorithm__correction__cap": float("nan")}, "algorithm.correction.cap", "from 1 to 100000000"),
        ({**MASK, "algorithm__correction__floor": -0.1}, "algorithm.correction.floor", "from 0 to 1"),
        ({**MASK, "algorithm__correction__floor": 1.5}, "algorithm.correction.floor", "from 0 to 1"),
        (
            {"algorithm__correction__kind": CorrectionKind.truncate, "algorithm__correction__floor": 0.5},
            "algorithm.correction.floor",
            "kind to mask",
        ),
    ],
)
def test_refused_ways_to_get_rollouts(config, settings, key, part, monkeypatch):
    for name in ("CLIPO_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)
    error = refusal(assign(config, **settings), 2)
    assert key in [problem.key for problem in error.problems], error
    assert part in str(error), error


def test_a_key_opens_other_machines_and_is_never_shown(config, monkeypatch):
    monkeypatch.setenv("CLIPO_API_KEY", "sesame-7")
    there = {**SGLANG, "rollout__endpoints": [ELSEWHERE], "rollout__sync__host": "10.0.0.1", "serve__host": "0.0.0.0"}
    check(assign(config, **there))
    error = refusal(assign(config, rollout__top_p=0.0, rollout__sync__host="127.0.0.1"))
    assert "sesame" not in str(error)
    assert {problem.key for problem in error.problems} == {"rollout.top_p", "rollout.sync.host"}
    monkeypatch.setenv("CLIPO_API_KEY", "")
    assert "is not set" in str(refusal(config))


def test_colocated_servers_open_memory_unless_another_transport_is_asked_for(config):
    """NCCL refuses two ranks on one GPU, so a broadcast cannot reach them."""
    colocated = assign(config, rollout__engine=EngineKind.sglang, rollout__colocated=True)
    assert transport_of(colocated) is Transport.ipc
    assert transport_of(assign(colocated, rollout__sync__transport=Transport.disk)) is Transport.disk
    assert transport_of(assign(config, rollout__colocated=False, rollout__sync__transport=None)) is Transport.broadcast


def test_default_transports(config):
    kinds = {engine: transport_of(assign(config, rollout__engine=engine)) for engine in EngineKind}
    assert {engine.value: transport.value for engine, transport in kinds.items()} == {
        "local": "in_process",
        "sglang": "broadcast",
        "vllm": "disk",
    }


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
