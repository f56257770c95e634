"""Checks of what methods go with: the critic's folder, groups of one, windows, losses over groups, their options."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_folders import FACTS, model_folder

from clipo_megatron.algorithms.methods.registry import BASE_METHODS, base_method_class
from clipo_megatron.algorithms.policy_loss import GroupLoss
from clipo_megatron.checks.run import check
from clipo_megatron.config.errors import ConfigError, ConfigProblem
from clipo_megatron.config.schema import (
    CorrectionKind,
    KLKind,
    KLPlace,
    Level,
    PluginConfig,
    RunConfig,
    SourceConfig,
)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Sound, and of GRPO with CLIPO."""
    config = RunConfig()
    config.model.path = model_folder(tmp_path / "model", FACTS)
    (tmp_path / "train.jsonl").touch()
    config.data.train = [SourceConfig(path=str(tmp_path / "train.jsonl"))]
    return config


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


def refused(config: RunConfig, ranks: int | None = None) -> tuple[ConfigProblem, ...]:
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
    ],
)
def test_groups_of_one_where_nobody_compares_them(config, settings):
    check(changed(config, {"rollout.samples_per_prompt": 1, **settings}))


# ---------------------------------------------------------------- methods beside one another

REWARDED = {"algorithm.kl.coefficient": 0.1, "algorithm.kl.place": KLPlace.reward}
VERDICTS = {"algorithm.options": {"weigh_by_reward": False}}
CORRECTED = {"algorithm.correction.kind": CorrectionKind.truncate}
GROUP_LOSSES = [name for name in BASE_METHODS if issubclass(base_method_class(name), GroupLoss)]


def beside(*names: str) -> dict[str, Any]:
    return {"algorithm.plugins": [PluginConfig(name) for name in names]}


@pytest.mark.parametrize("plugin", ["cepo", "d3s", "adora", "pipo"])
@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_nothing_acts_on_advantages_that_are_not_there(config, name, plugin):
    (problem,) = refused(changed(config, {"algorithm.name": name} | beside("hapo", plugin)))
    assert problem.key == "algorithm.plugins[1].name" and problem.value == plugin
    assert f"it acts on advantages, and {name} has none" in str(problem)


@pytest.mark.parametrize(
    ("name", "settings", "key", "part"),
    [
        ("disco", CORRECTED, "algorithm.correction.kind", "Set it to none"),
        ("conspo", CORRECTED, "algorithm.correction.kind", "weighs no single rollouts"),
        ("disco", VERDICTS, "algorithm.options.weigh_by_reward", "which is all that clipo.enabled would change"),
        (
            "conspo",
            VERDICTS | REWARDED | {"clipo.enabled": False},
            "algorithm.options.weigh_by_reward",
            "all that algorithm.kl.place = reward would change",
        ),
        (
            "disco",
            VERDICTS | beside("hapo", "papo") | {"clipo.enabled": False},
            "algorithm.options.weigh_by_reward",
            "all that hapo would change",
        ),
        ("hpt", {"rollout.max_refill_rounds": 2}, "rollout.max_refill_rounds", "hpt teaches them demonstrations"),
        (
            "grpo",
            {"algorithm.kl.coefficient": 0.1, "algorithm.kl.kind": KLKind.k1},
            "algorithm.kl.kind",
            "whatever the reference policy says. Set it to k2 or k3",
        ),
        ("ppo", beside("adora"), "algorithm.plugins[0].name", "would take what it scales for rewards"),
        ("t_ppo", beside("adora"), "algorithm.plugins[0].name", "t_ppo would take"),
        ("reinforce_pp", beside("adora") | REWARDED, "algorithm.plugins[0].name", "whitens what it scales"),
        ("reinforce_pp_baseline", beside("adora") | REWARDED, "algorithm.plugins[0].name", "kl.place=loss"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(config, name, settings, key, part):
    (problem,) = refused(changed(config, {"algorithm.name": name} | settings))
    assert problem.key == key and part in str(problem)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("disco", REWARDED | beside("hapo", "empo", "papo")),
        ("conspo", VERDICTS | beside("papo") | {"clipo.enabled": False, "algorithm.kl.coefficient": 0.1}),
        ("copg", CORRECTED),
        ("grpo", REWARDED | {"algorithm.kl.kind": KLKind.k1} | beside("adora", "d3s", "cepo", "pipo")),
        ("grpo", {"algorithm.kl.kind": KLKind.k1}),
        ("reinforce_pp", beside("adora")),
    ],
)
def test_what_goes_together(config, name, settings):
    check(changed(config, {"algorithm.name": name} | settings))


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("dapo", {"cushion": 2000}, "so many tokens below rollout.max_new_tokens = 1024"),
        ("dapo", {"cushion": 600, "longest": 500}, "so many tokens below `longest` = 500"),
        ("dapo", {"longest": 20480, "cushion": 4096}, "longest = 20480: no response is longer than"),
        ("riskpo", {"start": math.inf}, "start = inf: it must be a finite number"),
        ("copg", {"beta": 0.0}, "it must be at least 1e-06"),
        ("conspo", {"margin": math.nan}, "it must be a finite number"),
        ("cepo", {"mix_steps": 0}, "it must be at least 1"),
        ("cepo", {"hint": "The answer."}, "it has no {answer} in it"),
        ("d3s", {"relax_steps": 0}, "it must be at least 1"),
        ("d3s", {"rollouts": 0.0}, "it must be from 1e-06 to 1"),
        ("d3s", {"tokens": 0.0}, "it must be from 1e-06 to 1"),
        ("gcpo", {"pattern": "("}, "pattern = (: it is no regular expression: missing )"),
        ("gcpo", {"weight": math.nan}, "it must be a finite number"),
        ("grace", {"weight": math.nan}, "it must be a finite number"),
        ("c_grpo", {"score": "absent.py:score"}, "score = absent.py:score: there is no such file"),
        ("c_grpo", {"score": "score.py"}, "no function is named after a colon"),
    ],
)
def test_values_of_options_are_judged_before_anything_is_loaded(config, name, options, part):
    if name in BASE_METHODS:
        changed(config, {"algorithm.name": name, "algorithm.options": options})
    else:
        config.algorithm.plugins = [PluginConfig(name, options)]
    (problem,) = refused(config)
    assert part in str(problem)


def test_values_of_options_that_are_sound(config):
    changed(config, {"algorithm.name": "dapo", "algorithm.options": {"cushion": 1024, "longest": 2000}})
    config.algorithm.plugins = [PluginConfig("c_grpo", {"score": "a.module:score"})]
    check(config)
    check(changed(config, {"algorithm.options": {"penalty": 0, "cushion": 4096}}))


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
        ({"rollout.max_refill_rounds": 2}, "rollout.max_refill_rounds", "have no verdicts yet"),
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


# ---------------------------------------------------------------- classes of a user's own

OWN = """
from collections.abc import Iterator
from dataclasses import dataclass

from clipo_megatron.algorithms.hook import Hook, MethodOptions
from clipo_megatron.algorithms.methods.grpo import GRPO
from clipo_megatron.algorithms.policy_loss import GroupLoss
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.ranges import within


@dataclass
class Options(MethodOptions):
    low: float = within(0.1, 0, 1)
    high: float = within(0.9, 0, 1)

    def problems(self, config):
        if self.low > self.high:
            yield ConfigProblem("low", f"high is {self.high}", "Lower it", self.low)


class Plain(GRPO):
    options_class = Options


class Declared(GRPO):
    needs_groups = False
    supports_windows = True
    clip_low_below_one = False
    needs = frozenset({"values"})


class OverGroups(GroupLoss):
    pass


class Scaling(Hook):
    def shape_advantage(self, table, reward, advantage):
        return 2 * advantage


class Judging(Hook):
    options_class = Options


class Patient(Hook):
    supports_windows = True


class NoHook:
    pass
"""
ONE_ROLLOUT = {"clipo.enabled": False, "rollout.samples_per_prompt": 1}
WINDOW = {"rollout.window_tokens": 256}


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], str]:
    """The name of a class of a user's own, in a file."""
    (tmp_path / "own.py").write_text(OWN)
    return lambda name: f"{tmp_path / 'own.py'}:{name}"


@pytest.mark.parametrize(
    ("base", "plugins", "settings"),
    [
        ("Declared", [], ONE_ROLLOUT),
        ("Declared", ["Patient"], WINDOW),
        ("Declared", [], {"algorithm.clip_low": 1.5, "critic.warmup_steps": 2}),
        ("OverGroups", ["Judging"], {}),
        ("Plain", ["Scaling", "Judging"], CORRECTED | {"algorithm.options": {"low": 0.2}}),
    ],
)
def test_what_a_class_of_ones_own_declares_is_believed(config, own, base, plugins, settings):
    changed(config, {"algorithm.name": own(base)} | settings)
    config.algorithm.plugins = [PluginConfig(own(name)) for name in plugins]
    check(config)


@pytest.mark.parametrize(
    ("base", "plugins", "settings", "part"),
    [
        ("Plain", [], ONE_ROLLOUT, "are against the prompt's other rollouts"),
        ("Plain", [], WINDOW, "does not learn from responses that have not ended"),
        ("Declared", ["Judging"], WINDOW, "judges whole responses"),
        ("Plain", [], {"algorithm.clip_low": 1.5}, "must stay positive"),
        ("Plain", [], {"critic.warmup_steps": 2}, "has no critic"),
        ("OverGroups", ["Scaling"], {}, "it acts on advantages"),
        ("OverGroups", [], CORRECTED, "weighs no single rollouts"),
        ("Declared", ["Scaling"], {}, "would take what it scales for rewards"),
        ("Plain", [], {"algorithm.options": {"lo": 0.2}}, "options.lo = 0.2: "),
        ("Plain", [], {"algorithm.options": {"low": 2.0}}, "options.low = 2.0: it must be from 0 to 1"),
        ("Plain", [], {"algorithm.options": {"low": "much"}}, "a number was expected"),
        ("Plain", [], {"algorithm.options": {"low": 0.95}}, "algorithm.options.low = 0.95: high is 0.9. Lower it"),
        ("Judging", [], {}, "is no subclass of clipo_megatron.algorithms.policy_loss.PolicyLoss"),
        ("Absent", [], {}, "Absent is not in it. Correct the name"),
        ("Plain", ["NoHook"], {}, "is no subclass of clipo_megatron.algorithms.hook.Hook"),
    ],
)
def test_a_class_of_ones_own_is_checked_as_a_built_in_one(config, own, base, plugins, settings, part):
    changed(config, {"algorithm.name": own(base)} | settings)
    config.algorithm.plugins = [PluginConfig(own(name)) for name in plugins]
    (problem,) = refused(config)
    assert part in str(problem)


def test_a_class_that_is_on_other_machines_only_is_no_problem_here(config):
    changed(config, {"algorithm.name": "absent_package.module:Baseline"})
    (problem,) = refused(config)
    assert "absent_package.module cannot be imported: ModuleNotFoundError" in str(problem)
    assert check(config, absent=True) == [problem]
