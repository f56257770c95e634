"""Cross-checks: what would fail after minutes of model building is refused in milliseconds."""

import json
import time

import pytest

from clipo_megatron.config.checks import check, data_parallel, requested_ranks, source_name
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import DataConfig, LayoutConfig, ModelConfig, RunConfig, SourceConfig

FACTS = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 30,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(FACTS))
    (model / "model.safetensors").touch()
    (model / "chat_template.jinja").write_text("{{ messages }}")
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
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check(config, ranks=ranks)
    assert time.monotonic() - started < 1
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


def test_intermediate_size(config, folder):
    (folder / "model" / "config.json").write_text(json.dumps({**FACTS, "intermediate_size": 50}))
    assert "intermediate size, 50" in str(refusal(assign(config, layout__tp=4)))


@pytest.mark.parametrize(
    ("settings", "ranks", "key", "part"),
    [
        ({"layout__pp": 4}, None, "layout.pp", "1, 2, 3, 5, 6, 10, 15, 30"),
        ({"layout__tp": 0}, None, "layout.tp", "at least 1"),
        ({"layout__sequence_parallel": True}, None, "layout.sequence_parallel", "layout.tp is 1"),
        ({"layout__tp": 2, "layout__pp": 2}, 6, "", "4 or 8 ranks"),
        ({"layout__tp": 2, "layout__dp": 2}, 8, "layout.dp", "Start 4 ranks"),
        ({"layout__dp": 32}, None, "data.prompts_per_step", "32 model replicas"),
        ({"data__prompts_per_step": 15, "algorithm__mini_batches": 4}, None, "data.prompts_per_step", "12 or 16"),
        ({"rollout__samples_per_prompt": 1}, None, "rollout.samples_per_prompt", "group of one"),
        ({"rollout__samples_per_prompt": 0}, None, "rollout.samples_per_prompt", "at least 1"),
        ({"rollout__max_new_tokens": 4000}, None, "rollout.max_new_tokens", "3584 or less"),
        ({"eval__max_new_tokens": 4000}, None, "eval.max_new_tokens", "3584 or less"),
        ({"layout__max_tokens_per_microbatch": 0}, None, "layout.max_tokens_per_microbatch", "at least 1"),
        ({"clipo__temperature": 0.0}, None, "clipo.temperature", "above 0"),
        ({"clipo__weight": -0.1}, None, "clipo.weight", "at least 0"),
        ({"clipo__floor": 0.5}, None, "clipo.floor", "0 or less"),
        ({"clipo__warmup_steps": 100}, None, "clipo.warmup_steps", "never give a bonus"),
        ({"algorithm__clip_low": 1.0}, None, "algorithm.clip_low", "below 1"),
        ({"algorithm__clip_high": -0.2}, None, "algorithm.clip_high", "at least 0"),
        ({"algorithm__constant_length": 8}, None, "algorithm.constant_length", "constant"),
        ({"rollout__top_p": 0.0}, None, "rollout.top_p", "above 0"),
        ({"rollout__temperature": float("nan")}, None, "rollout.temperature", "positive"),
        ({"optimizer__schedule": "cosin"}, None, "optimizer.schedule", "constant, linear, cosine"),
        ({"optimizer__learning_rate": float("inf")}, None, "optimizer.learning_rate", "positive"),
        ({"optimizer__beta2": 1.0}, None, "optimizer.beta2", "[0, 1)"),
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
        (lambda model: (model / "chat_template.jinja").unlink(), "chat template"),
    ],
)
def test_model_folder(config, folder, spoil, part):
    spoil(folder / "model")
    error = refusal(config)
    assert part in str(error) and error.problems[0].key == "model.path"


def test_chat_template_inside_the_tokenizer_configuration(config, folder):
    (folder / "model" / "chat_template.jinja").unlink()
    (folder / "model" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    check(config)


def test_all_problems_come_at_once_and_numbered(config):
    error = refusal(assign(config, layout__tp=5, layout__pp=4, clipo__temperature=-1.0, data__train=[]))
    assert [problem.key for problem in error.problems] == ["layout.tp", "layout.pp", "data.train", "clipo.temperature"]
    assert "4 configuration problems" in str(error) and "  4. clipo.temperature = -1.0" in str(error)


def test_ranks():
    assert requested_ranks(LayoutConfig(tp=2, pp=3)) == 6
    assert requested_ranks(LayoutConfig(tp=2, pp=3, dp=4)) == 24
    assert data_parallel(LayoutConfig(tp=2), 8) == 4
    assert data_parallel(LayoutConfig(tp=2), None) == 1


def test_source_names():
    assert source_name(SourceConfig(path="a/b.jsonl")) == "b"
    assert source_name(SourceConfig(generator="gcd")) == "gcd"
    assert source_name(SourceConfig(generator="gcd", name="x")) == "x"
