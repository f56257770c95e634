"""Checks of the algorithm's section: names of methods, their options, and settings that a method does not read.

What a method reads and needs is asked of its class, built in or a user's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace

from clipo_megatron.algorithms.hook import Hook, Replay, Signal
from clipo_megatron.algorithms.importance import correction_of
from clipo_megatron.algorithms.methods.registry import (
    BASE_METHODS,
    PLUGINS,
    base_method,
    base_method_class,
    has_critic,
    is_import_path,
    max_refill_rounds,
    plugin_class,
    plugins,
)
from clipo_megatron.algorithms.policy_loss import ClippedPolicyLoss, GroupLoss
from clipo_megatron.algorithms.user_classes import import_path_problems
from clipo_megatron.config.errors import ConfigError, ConfigProblem
from clipo_megatron.config.load import option_problems, typed_options
from clipo_megatron.config.ranges import range_problems
from clipo_megatron.config.schema import (
    Aggregation,
    AlgorithmConfig,
    BonusPlace,
    CorrectionKind,
    CriticConfig,
    KLKind,
    KLPlace,
    PluginConfig,
    RunConfig,
)


def method_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """What is wrong with the base method, the plug-ins and the settings that they read."""
    algorithm = config.algorithm
    yield from _named(config, "algorithm", algorithm)
    for index, plugin in enumerate(algorithm.plugins):
        yield from _named(config, f"algorithm.plugins[{index}]", plugin)
    names = [plugin.name for plugin in algorithm.plugins]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield ConfigProblem(
            "algorithm.plugins", f"{name} is there {names.count(name)} times", "Keep one", show_value=False
        )
    yield from _base_method(algorithm)
    yield from _over_groups(config)
    yield from _shaped_too_early(algorithm)
    yield from _bonus_on_advantages(config)
    if Signal.demonstrations in base_method(algorithm).needs and (rounds := max_refill_rounds(config)):
        reason = f"groups without a correct rollout would be replaced, and {algorithm.name} teaches them demonstrations"
        yield ConfigProblem("rollout.max_refill_rounds", reason, "Set it to 0", rounds)
    kl = algorithm.kl
    if kl.coefficient > 0 and kl.kind is KLKind.k1 and kl.place is KLPlace.loss:
        reason = "its gradient is that of log pi alone, whatever the reference policy says"
        yield ConfigProblem("algorithm.kl.kind", reason, "Set it to k2 or k3, or algorithm.kl.place to reward", kl.kind)
    yield from _critic(config)


def _base_method(algorithm: AlgorithmConfig) -> Iterator[ConfigProblem]:
    """Shared settings that the base method does not read, or not with this value."""
    method = base_method(algorithm)
    for key in ("clip_low", "clip_high"):
        if method.default_clip is None and getattr(algorithm, key) is not None:
            reason = f"{algorithm.name} clips no ratio, so it would be ignored"
            yield ConfigProblem(f"algorithm.{key}", reason, "Set it to null", getattr(algorithm, key))
    if getattr(method, "loss", None) is not ClippedPolicyLoss.loss:
        for key, unset in (("dual_clip", "null"), ("released_clamps", "false")):
            if value := getattr(algorithm, key):
                reason = f"the loss of {algorithm.name} is not PPO's clipped one, so it would be ignored"
                yield ConfigProblem(f"algorithm.{key}", reason, f"Set it to {unset}", value)
    aggregation = algorithm.aggregation or method.default_aggregation
    if method.default_aggregation is None and algorithm.aggregation is not None:
        reason = f"the loss of {algorithm.name} is over whole groups, so it would be ignored"
        yield ConfigProblem("algorithm.aggregation", reason, "Set it to null", algorithm.aggregation.value)
    if algorithm.constant_length is not None and aggregation is not Aggregation.constant:
        reason = "only the aggregation `constant` reads it"
        remedy = "Set it to null, or algorithm.aggregation to constant"
        yield ConfigProblem("algorithm.constant_length", reason, remedy, algorithm.constant_length)
    below_one = method.default_clip is not None and method.clip_low_below_one
    if algorithm.clip_low is not None and below_one and algorithm.clip_low >= 1:
        reason = "the probability ratio is held above 1 - clip_low, which must stay positive"
        yield ConfigProblem("algorithm.clip_low", reason, "Set it below 1; 0.2 is usual", algorithm.clip_low)


def _over_groups(config: RunConfig) -> Iterator[ConfigProblem]:
    """Settings that a loss over whole groups does not read, as it has no advantages and weighs no single rollouts."""
    algorithm, method = config.algorithm, base_method(config.algorithm)
    if not issubclass(method, GroupLoss):
        return
    name, chosen = algorithm.name, list(zip(algorithm.plugins, plugins(algorithm), strict=True))
    for index, (plugin, kind) in enumerate(chosen):
        if issubclass(kind, Replay) or _implements(kind, "shape_advantage", "token_advantage"):
            reason = f"it acts on advantages, and {name} has none: its loss is over whole groups"
            remedy = "Remove it, or choose another algorithm.name"
            yield ConfigProblem(f"algorithm.plugins[{index}].name", reason, remedy, plugin.name)
    correction = correction_of(config).kind
    if correction is not CorrectionKind.none and not method.takes_off_policy_rollouts:
        reason = f"the loss of {name} is over whole groups and weighs no single rollouts, so it would be ignored"
        if algorithm.correction.kind is None:
            reason += f"; with rollout.ahead = {config.rollout.ahead} it is what null means"
        yield ConfigProblem("algorithm.correction.kind", reason, "Set it to none", correction)
    if algorithm.options.get("weigh_by_reward") is False:
        idle = ["clipo.enabled"] if config.clipo.enabled else []
        if algorithm.kl.coefficient and algorithm.kl.place is KLPlace.reward:
            idle.append("algorithm.kl.place = reward")
        idle += [plugin.name for plugin, kind in chosen if _implements(kind, "shape_reward", "bonus", "shape_bonus")]
        if idle:
            reason = f"{name} then reads verdicts and no rewards, which is all that {', '.join(idle)} would change"
            remedy = "Set it to true, or leave out what changes rewards"
            yield ConfigProblem("algorithm.options.weigh_by_reward", reason, remedy, False)


def _shaped_too_early(algorithm: AlgorithmConfig) -> Iterator[ConfigProblem]:
    """Plug-ins that scale what the base method's `advantage` gives, where that is not the advantage yet."""
    kl_in_reward, name = algorithm.kl.coefficient > 0 and algorithm.kl.place is KLPlace.reward, algorithm.name
    for index, (plugin, kind) in enumerate(zip(algorithm.plugins, plugins(algorithm), strict=True)):
        if not _implements(kind, "shape_advantage"):
            continue
        key, remedy = f"algorithm.plugins[{index}].name", "Remove it, or choose another algorithm.name"
        if Signal.values in base_method(algorithm).needs:
            reason = f"{name} would take what it scales for rewards, so that success would be worth less"
            yield ConfigProblem(key, reason, remedy, plugin.name)
        elif base_method(algorithm).reads_token_rewards and kl_in_reward:
            reason = f"with algorithm.kl.place = reward {name} whitens what it scales, which undoes that"
            yield ConfigProblem(key, reason, f"{remedy}, or algorithm.kl.place=loss", plugin.name)


def _bonus_on_advantages(config: RunConfig) -> Iterator[ConfigProblem]:
    """A bonus that is to be added to the advantage, where there is no bonus, or the base method's is not one yet."""
    algorithm, method = config.algorithm, base_method(config.algorithm)
    if config.clipo.place is BonusPlace.reward:
        return
    name, kl = algorithm.name, algorithm.kl
    if not config.clipo.enabled and not any(_implements(each, "bonus") for each in plugins(algorithm)):
        reason, remedy = "nothing pays a bonus, so it would be ignored", "Set it to reward, or clipo.enabled to true"
    elif issubclass(method, GroupLoss):
        reason = f"{name} has no advantages: its loss is over whole groups"
        remedy = "Set it to reward, or choose another algorithm.name"
    elif Signal.values in method.needs:
        reason = f"{name} takes what it is added to for rewards, so it would act as `reward` does"
        remedy = "Set it to reward, or choose another algorithm.name"
    elif method.reads_token_rewards and kl.coefficient > 0 and kl.place is KLPlace.reward:
        reason = f"with algorithm.kl.place = reward {name} whitens what it is added to, as `reward` does"
        remedy = "Set it to reward, or algorithm.kl.place to loss"
    else:
        return
    yield ConfigProblem("clipo.place", reason, remedy, config.clipo.place.value)


def _implements(kind: type[Hook], *names: str) -> bool:
    return any(getattr(kind, name) is not getattr(Hook, name) for name in names)


def _critic(config: RunConfig) -> Iterator[ConfigProblem]:
    settings, algorithm = config.critic, config.algorithm
    if settings != CriticConfig() and not has_critic(algorithm):
        reason = f"{algorithm.name} has no critic, so the section would be ignored"
        yield ConfigProblem("critic", reason, "Remove it, or set algorithm.name to ppo", show_value=False)


def _named(config: RunConfig, key: str, method: AlgorithmConfig | PluginConfig) -> Iterator[ConfigProblem]:
    """What is wrong with a base method's or plug-in's name or options."""
    name, known = method.name, BASE_METHODS if isinstance(method, AlgorithmConfig) else PLUGINS
    if is_import_path(name):
        if misplaced := list(import_path_problems(f"{key}.name", name, "Class")):
            yield from misplaced
            return
    elif name not in known:
        other = BASE_METHODS if known is PLUGINS else PLUGINS
        if name in other:
            section = "algorithm.name" if other is BASE_METHODS else "algorithm.plugins"
            yield ConfigProblem(f"{key}.name", f"{name} belongs into {section}", "Move it there", name)
            return
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(known)}, or file.py:Class"
        yield ConfigProblem(f"{key}.name", "`clipo methods` shows no such method", remedy, name)
        return
    try:
        chosen = base_method_class(name) if known is BASE_METHODS else plugin_class(name)
    except ConfigError as error:
        reason, _, remedy = str(error).rpartition(". ")
        missing = isinstance(error.__cause__, ModuleNotFoundError)  # what else is wrong is wrong everywhere
        yield ConfigProblem(f"{key}.name", reason, remedy, name, absent=missing)
        return
    yield from _options(config, chosen, method, f"{key}.options.")


def _options(
    config: RunConfig, chosen: type[Hook], method: AlgorithmConfig | PluginConfig, prefix: str
) -> Iterator[ConfigProblem]:
    """What is wrong with the options of a method, whose class is `chosen`: names and types, else values, else what the
    options themselves say."""
    if problems := list(option_problems(chosen.options_class, method.options, prefix, owner=method.name)):
        yield from problems
        return
    options = typed_options(chosen.options_class, method.options)
    problems = list(range_problems(options, prefix))
    yield from problems or (replace(each, key=f"{prefix}{each.key}") for each in options.problems(config))
