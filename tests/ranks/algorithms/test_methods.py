"""Every method, alone and with CLIPO: its parts, real steps on any layout, and gradients against autograd."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from method_steps import by_autograd
from policy_steps import STEPS, configuration, train
from ranks import RankPool
from tiny_models import tiny_llama
from update_steps import one_update

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import Hook
from clipo_megatron.algorithms.methods.registry import BASE_METHODS, PLUGINS
from clipo_megatron.checks.methods import method_problems
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import (
    CorrectionConfig,
    CorrectionKind,
    KLConfig,
    KLPlace,
    LayoutConfig,
    PluginConfig,
    RunConfig,
)

METHODS = {**BASE_METHODS, **PLUGINS}
TOLERANCE = 1e-5
VOCAB = 263


def with_method(name: str, folder: Path, *, clipo: bool) -> RunConfig:
    """A small run with one method: a base method, or a plug-in on top of GRPO."""
    config = configuration(tiny_llama(folder, vocab=VOCAB, layers=2))
    config.clipo.enabled = clipo
    if name in BASE_METHODS:
        config.algorithm.name = name
    else:
        config.algorithm.plugins = [PluginConfig(name)]
    return config


# Those whose hooks act on ranks and which are in no stack below. What shapes rewards and advantages is the same in
# every layout.
REPRESENTATIVES = ("grpo", "ppo", "conspo")
assert set(REPRESENTATIVES) <= set(METHODS)


@pytest.mark.parametrize(
    ("name", "clipo"),
    [
        pytest.param(
            name,
            clipo,
            marks=() if clipo and name in REPRESENTATIVES else pytest.mark.full,
            id=f"{name}, {'with CLIPO' if clipo else 'alone'}",
        )
        for name in METHODS
        for clipo in (False, True)
    ],
)
def test_every_method_takes_steps_on_any_layout(name: str, clipo: bool, ranks: RankPool, tmp_path: Path) -> None:
    """Two steps and one more, the same parameters on TP2 x PP2 as on one rank, and not those of the start."""
    config = with_method(name, tmp_path, clipo=clipo)
    assert list(method_problems(config)) == []
    (alone,) = ranks.run(train, 1, config, LayoutConfig(max_tokens_per_microbatch=100))
    moved = max(float((after - alone["weights_before"][key]).abs().max()) for key, after in alone["weights"].items())
    assert moved > 1e-4
    assert len(alone["updates"]) >= STEPS * config.algorithm.mini_batches
    assert all(math.isfinite(update["policy/loss"]) for update in alone["updates"])
    for rank in ranks.run(train, 4, config, LayoutConfig(tp=2, pp=2, max_tokens_per_microbatch=100)):
        for key, theirs in alone["weights"].items():
            assert float((rank["weights"][key] - theirs).abs().max() / theirs.abs().max()) < TOLERANCE, key


STACKS: dict[str, dict[str, Any]] = {
    "demonstrations, selection": {
        "layout": {"pp": 2},
        "name": "hpt",
        "plugins": [PluginConfig("d3s", {"rollouts": 0.3, "tokens": 0.3})],
    },
    "rollout ratio, advantages of tokens": {
        "layout": {"tp": 2, "pp": 2},
        "name": "gspo",
        "clip_low": 0.05,
        "plugins": [PluginConfig("cepo"), PluginConfig("d3s", {"tokens": 0.3, "scope": "group"})],
        "correction": CorrectionConfig(CorrectionKind.truncate, cap=1.5),
        "kl": KLConfig(0.01),
    },
    "group loss, later weights": {
        "layout": {"tp": 2},
        "name": "disco",
        "epochs": 2,
        "plugins": [PluginConfig("hapo"), PluginConfig("papo")],
        "kl": KLConfig(0.01),
    },
    "returns of tokens, replay": {
        "layout": {"tp": 2, "pp": 2},
        "name": "reinforce_pp_baseline",
        "plugins": [PluginConfig("pipo", {"negative": 1.0})],
        "kl": KLConfig(0.3, place=KLPlace.reward),
    },
}


@pytest.mark.parametrize("name", STACKS)
def test_stacked_methods_on_four_ranks(name: str, ranks: RankPool, tmp_path: Path) -> None:
    """Selections, demonstrations, sums over ranks and held batches of several methods at once, with CLIPO."""
    config, settings = with_method("grpo", tmp_path, clipo=True), dict(STACKS[name])
    layout = LayoutConfig(**settings.pop("layout"), max_tokens_per_microbatch=60)
    for key, value in settings.items():
        setattr(config.algorithm, key, value)
    assert list(method_problems(config)) == []
    (alone,) = ranks.run(train, 1, config, LayoutConfig(max_tokens_per_microbatch=100))
    for rank in ranks.run(train, 4, config, layout):
        for key, theirs in alone["weights"].items():
            assert float((rank["weights"][key] - theirs).abs().max() / theirs.abs().max()) < TOLERANCE, key
    seen = {key for update in alone["updates"] for key, value in update.items() if value}
    acting = {"hpt": "policy/demonstration_loss", "disco": "papo/kl", "reinforce_pp_baseline": "pipo/phi"}
    assert {acting.get(config.algorithm.name, "policy/clip_fraction")} <= seen


def test_returns_of_tokens_are_whitened_over_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """REINFORCE++ with the KL in the reward: data-parallel ranks hold different tokens of one batch."""
    config = with_method("reinforce_pp", tmp_path, clipo=True)
    config.algorithm.kl.coefficient, config.algorithm.kl.place = 0.5, KLPlace.reward
    (alone,) = ranks.run(train, 1, config, LayoutConfig(max_tokens_per_microbatch=100))
    for rank in ranks.run(train, 4, config, LayoutConfig(tp=2, max_tokens_per_microbatch=100)):
        for key, theirs in alone["weights"].items():
            assert float((rank["weights"][key] - theirs).abs().max() / theirs.abs().max()) < TOLERANCE, key


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_autograd(name: str, ranks: RankPool, tmp_path: Path) -> None:
    """Packed, in micro-batches and two passes, against one graph over all rollouts of an unpacked model."""
    config = with_method(name, tmp_path, clipo=False)
    (ours,) = ranks.run(one_update, 1, config, LayoutConfig(max_tokens_per_microbatch=50), False)
    (theirs,) = ranks.run(by_autograd, 1, config)
    assert ours["micro_batches"] > 1
    largest = max(float(each.abs().max()) for each in theirs.values())
    assert largest > 0
    far = {key: float((ours["gradients"][key] - grad).abs().max()) / largest for key, grad in theirs.items()}
    assert {key: value for key, value in far.items() if not value < TOLERANCE} == {}


def problems(**algorithm: Any) -> list[str]:
    config = RunConfig()
    for key, value in algorithm.items():
        setattr(config.algorithm, key, value)
    return [str(problem) for problem in method_problems(config)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "gsp"}, "algorithm.name = gsp: `clipo methods` shows no such method. Did you mean gspo?"),
        ({"name": "hapo"}, "algorithm.name = hapo: hapo belongs into algorithm.plugins"),
        ({"plugins": [PluginConfig("grpo")]}, "grpo belongs into algorithm.name"),
        ({"name": "disco", "options": {"tao": 1}}, "disco has no such option. Did you mean tau?"),
        ({"name": "disco", "options": {"beta": "much"}}, "algorithm.options.beta = much: a number was expected"),
        ({"name": "disco", "clip_low": 0.2}, "disco clips no ratio"),
        ({"name": "nowhere.py:Mine"}, "there is no such file"),
        ({"plugins": [PluginConfig("papo"), PluginConfig("papo")]}, "papo is there 2 times"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    (problem,) = problems(**settings)
    assert words in problem


def test_a_need_that_nothing_provides_is_refused() -> None:
    class Rubric(Hook):
        needs = frozenset({"rubric"})

    with pytest.raises(ConfigError, match="Rubric needs rubric, which nothing provides"):
        Algorithm([Rubric()])
