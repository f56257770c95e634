"""Checks of the algorithm's section: names of methods, their options, and settings that a method does not read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from clipo_megatron.algorithms.methods.registry import (
    BASELINES,
    PLUGINS,
    Acts,
    baseline,
    is_import_path,
    max_refill_rounds,
)
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.load import option_problems, typed_options
from clipo_megatron.config.option_limits import place_problems, value_problems
from clipo_megatron.config.schema import (
    Aggregation,
    AlgorithmConfig,
    CorrectionKind,
    CriticConfig,
    KLKind,
    KLPlace,
    PluginConfig,
    RunConfig,
)


def method_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Everything about methods that can be said without importing one."""
    algorithm = config.algorithm
    yield from _named(config, "algorithm", algorithm)
    for index, plugin in enumerate(algorithm.plugins):
        yield from _named(config, f"algorithm.plugins[{index}]", plugin)
    names = [plugin.name for plugin in algorithm.plugins]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield ConfigProblem(
            "algorithm.plugins", f"{name} is there {names.count(name)} times", "Keep one", show_value=False
        )
    if not is_import_path(algorithm.name):
        yield from _baseline(algorithm)
        yield from _over_groups(config)
        yield from _shaped_too_early(algorithm)
    if baseline(algorithm).demonstrations and (rounds := max_refill_rounds(config)):
        reason = f"groups without a correct rollout would be replaced, and {algorithm.name} teaches them demonstrations"
        yield ConfigProblem("rollout.max_refill_rounds", reason, "Set it to 0", rounds)
    kl = algorithm.kl
    if kl.coefficient > 0 and kl.kind is KLKind.k1 and kl.place is KLPlace.loss:
        reason = "its gradient is that of log pi alone, whatever the reference policy says"
        yield ConfigProblem("algorithm.kl.kind", reason, "Set it to k2 or k3, or algorithm.kl.place to reward", kl.kind)
    yield from _critic(config)


def _baseline(algorithm: AlgorithmConfig) -> Iterator[ConfigProblem]:
    """Shared settings that the baseline does not read, or not with this value."""
    method = baseline(algorithm)
    for key in ("clip_low", "clip_high"):
        if method.clip is None and getattr(algorithm, key) is not None:
            reason = f"{algorithm.name} clips no ratio, so it would be ignored"
            yield ConfigProblem(f"algorithm.{key}", reason, "Set it to null", getattr(algorithm, key))
    aggregation = algorithm.aggregation or method.aggregation
    if method.aggregation is None and algorithm.aggregation is not None:
        reason = f"the loss of {algorithm.name} is over whole groups, so it would be ignored"
        yield ConfigProblem("algorithm.aggregation", reason, "Set it to null", algorithm.aggregation.value)
    if algorithm.constant_length is not None and aggregation is not Aggregation.constant:
        reason = "only the aggregation `constant` reads it"
        remedy = "Set it to null, or algorithm.aggregation to constant"
        yield ConfigProblem("algorithm.constant_length", reason, remedy, algorithm.constant_length)
    if algorithm.clip_low is not None and method.clip and method.below_one and algorithm.clip_low >= 1:
        reason = "the probability ratio is held above 1 - clip_low, which must stay positive"
        yield ConfigProblem("algorithm.clip_low", reason, "Set it below 1; 0.2 is usual", algorithm.clip_low)


def _over_groups(config: RunConfig) -> Iterator[ConfigProblem]:
    """What a loss over whole groups does not read: it has no advantages and no weights of single rollouts."""
    algorithm = config.algorithm
    if baseline(algorithm).aggregation is not None:
        return
    name, known = algorithm.name, [(plugin.name, PLUGINS.get(plugin.name)) for plugin in algorithm.plugins]
    for index, (plugin, method) in enumerate(known):
        if method is not None and method.acts_on is Acts.advantage:
            reason = f"it acts on advantages, and {name} has none: its loss is over whole groups"
            remedy = "Remove it, or choose another algorithm.name"
            yield ConfigProblem(f"algorithm.plugins[{index}].name", reason, remedy, plugin)
    kind = algorithm.correction.kind
    if kind is not CorrectionKind.none and name != "copg":  # to which no rollouts are off-policy
        reason = f"the loss of {name} is over whole groups and weighs no single rollouts, so it would be ignored"
        yield ConfigProblem("algorithm.correction.kind", reason, "Set it to none", kind)
    if algorithm.options.get("weigh_by_reward") is False:
        idle = ["clipo.enabled"] if config.clipo.enabled else []
        if algorithm.kl.coefficient and algorithm.kl.place is KLPlace.reward:
            idle.append("algorithm.kl.place = reward")
        idle += [plugin for plugin, method in known if method is not None and method.acts_on is Acts.reward]
        if idle:
            reason = f"{name} then reads verdicts and no rewards, which is all that {', '.join(idle)} would change"
            remedy = "Set it to true, or leave out what changes rewards"
            yield ConfigProblem("algorithm.options.weigh_by_reward", reason, remedy, False)


def _shaped_too_early(algorithm: AlgorithmConfig) -> Iterator[ConfigProblem]:
    """ADORA's factors are of final advantages; some baselines compute theirs from what it gives."""
    kl_in_reward = algorithm.kl.coefficient > 0 and algorithm.kl.place is KLPlace.reward
    for index, plugin in enumerate(algorithm.plugins):
        if plugin.name != "adora":
            continue
        key, remedy = f"algorithm.plugins[{index}].name", "Remove it, or choose another algorithm.name"
        if baseline(algorithm).critic:
            reason = f"{algorithm.name} would take what it scales for rewards, so that success would be worth less"
            yield ConfigProblem(key, reason, remedy, plugin.name)
        elif algorithm.name in ("reinforce_pp", "reinforce_pp_baseline") and kl_in_reward:
            reason = f"with algorithm.kl.place = reward {algorithm.name} whitens what it scales, which undoes that"
            yield ConfigProblem(key, reason, f"{remedy}, or algorithm.kl.place=loss", plugin.name)


def _critic(config: RunConfig) -> Iterator[ConfigProblem]:
    settings, algorithm = config.critic, config.algorithm
    if settings.clip is not None and not settings.clip > 0:
        yield ConfigProblem(
            "critic.clip", "values could not move at all", "Set it above 0, or to null for no clipping", settings.clip
        )
    own = is_import_path(algorithm.name) or any(is_import_path(plugin.name) for plugin in algorithm.plugins)
    if settings != CriticConfig() and not own and not baseline(algorithm).critic:
        reason = f"{algorithm.name} has no critic, so the section would be ignored"
        yield ConfigProblem("critic", reason, "Remove it, or set algorithm.name to ppo", show_value=False)


def _named(config: RunConfig, key: str, plugin: AlgorithmConfig | PluginConfig) -> Iterator[ConfigProblem]:
    """A baseline or plug-in by its name, with its options."""
    name, known = plugin.name, BASELINES if isinstance(plugin, AlgorithmConfig) else PLUGINS
    if is_import_path(name):
        yield from place_problems(f"{key}.name", name, "Class")
        return
    if name not in known:
        other = BASELINES if known is PLUGINS else PLUGINS
        if name in other:
            section = "algorithm.name" if other is BASELINES else "algorithm.plugins"
            yield ConfigProblem(f"{key}.name", f"{name} belongs into {section}", "Move it there", name)
            return
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(known)}, or file.py:Class"
        yield ConfigProblem(f"{key}.name", "`clipo methods` shows no such method", remedy, name)
        return
    section = known[name].options
    problems = list(option_problems(section, plugin.options, f"{key}.options.", owner=name))
    yield from problems or value_problems(
        name, section, typed_options(section, plugin.options), f"{key}.options.", config
    )
