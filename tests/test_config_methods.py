"""Checks of what methods go with: the critic's folder, groups of one, windows, losses over groups, their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipo_megatron.config.checks import check
from clipo_megatron.config.errors import ConfigError, Problem
from clipo_megatron.config.schema import (
    Level,
    PluginConfig,
    RunConfig,
    SourceConfig,
)

pytestmark = pytest.mark.timeout(60)

FACTS = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 30,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "vocab_size": 263,
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Sound, and of GRPO with CLIPO."""
    config = RunConfig()
    config.model.path = model_folder(tmp_path / "model", FACTS)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "train.jsonl").touch()
    config.data.train = [SourceConfig(path=str(tmp_path / "train.jsonl"))]
    return config


def model_folder(path: Path, facts: dict[str, Any]) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(facts))
    (path / "model.safetensors").touch()
    return str(path)


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """With settings by their dotted keys."""
    for key, value in settings.items():
        *sections, name = key.split(".")
        place: Any = config
        for section in sections:
            place = getattr(place, section)
        assert hasattr(place, name), key
        setattr(place, name, value)
    return config


def refused(config: RunConfig, ranks: int | None = None) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        check(config, ranks=ranks)
    return caught.value.problems


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "its architecture is GPT2LMHeadModel"),
        ({"vocab_size": 128}, "its vocab_size is 128, and that of model.path is 263"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "with layout.tp = 2 it does not divide the model's 7"),
        ({"num_hidden_layers": 29}, "with layout.pp = 2 it does not divide the model's 29 layers"),
        ({"max_position_embeddings": 1000}, "it takes 1000 tokens, and a sequence can reach 1536"),
        (None, "there is no such folder"),
    ],
)
def test_a_critic_is_held_against_the_policy(config, tmp_path, facts, part):
    settings = {"algorithm.name": "ppo", "critic.path": str(tmp_path / "critic"), "layout.tp": 2, "layout.pp": 2}
    changed(config, settings)
    if facts is not None:
        model_folder(tmp_path / "critic", {**FACTS, "num_hidden_layers": 10})
        check(config, ranks=4)
        model_folder(tmp_path / "critic", FACTS | facts)
    (problem,) = refused(config, ranks=4)
    assert problem.key == "critic.path" and part in str(problem)


@pytest.mark.parametrize(
    "settings",
    [
        {"clipo.enabled": False, "algorithm.name": "reinforce_pp"},
        {"clipo.level": Level.batch, "algorithm.name": "ppo"},
        {"clipo.enabled": False, "algorithm.name": "a.module:Baseline"},
    ],
)
def test_groups_of_one_where_nobody_compares_them(config, settings):
    check(changed(config, {"rollout.samples_per_prompt": 1, **settings}))


# ---------------------------------------------------------------- windows


WINDOWS = {"algorithm.name": "t_ppo", "rollout.window_tokens": 256}


def test_windows_of_t_ppo(config):
    check(changed(config, WINDOWS))
    check(changed(config, {"data.prompts_per_step": 16, "algorithm.mini_batches": 4, "layout.dp": 4}))


@pytest.mark.parametrize(
    ("settings", "key", "part"),
    [
        ({"rollout.window_tokens": 0}, "rollout.window_tokens", "it must be at least 1"),
        (
            {"rollout.window_tokens": 1024},
            "rollout.window_tokens",
            "no response is longer than rollout.max_new_tokens = 1024",
        ),
        ({"algorithm.name": "ppo"}, "rollout.window_tokens", "ppo does not learn from responses that have not ended"),
        (
            {"algorithm.plugins": [PluginConfig("hapo")]},
            "rollout.window_tokens",
            "the plug-in hapo judges whole responses",
        ),
        ({"rollout.over_sampling": 1.5}, "rollout.over_sampling", "nothing is left unfinished by over-sampling"),
        ({"rollout.refill_rounds": 2}, "rollout.refill_rounds", "have no verdicts yet"),
        ({"layout.share_prompts": True}, "layout.share_prompts", "go on from different tokens"),
        (
            {"data.prompts_per_step": 8, "algorithm.mini_batches": 4, "layout.dp": 3},
            "data.prompts_per_step",
            "each with as few as one rollout that goes on, and not all of the 3 model replicas would get one. "
            "Set it to 12 or more",
        ),
    ],
)
def test_what_windows_do_not_go_with(config, settings, key, part):
    (problem,) = refused(changed(config, WINDOWS | settings))
    assert problem.key == key and part in str(problem)


def test_windows_with_classes_of_ones_own(config):
    """Which may learn from what has not ended: nobody knows."""
    own = {"algorithm.name": "a.module:Baseline", "algorithm.plugins": [PluginConfig("a.module:Plugin")]}
    check(changed(config, WINDOWS | own))
