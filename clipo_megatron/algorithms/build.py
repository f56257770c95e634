"""From a configuration to an algorithm: named methods, and stages of a user's own."""

from __future__ import annotations

import importlib
from typing import Any

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.clipo.stage import Clipo
from clipo_megatron.algorithms.final_answers import Answers
from clipo_megatron.algorithms.hook import Hook, HookContext, Signal
from clipo_megatron.algorithms.importance import OffPolicyCorrection
from clipo_megatron.algorithms.kl import EntropyBonus, KLLoss, KLReward
from clipo_megatron.algorithms.methods.ppo import CriticWarmup
from clipo_megatron.algorithms.methods.registry import BASELINES, PLUGINS, baseline, is_import_path
from clipo_megatron.algorithms.policy_loss import BaselineSettings
from clipo_megatron.algorithms.user_classes import imported
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import typed_options
from clipo_megatron.config.schema import Aggregation, CorrectionKind, KLConfig, KLPlace, RunConfig


def build_algorithm(config: RunConfig, context: HookContext | None = None) -> Algorithm:
    """The algorithm that a configuration names: a baseline, its KL and entropy terms, plug-ins, and CLIPO's reward.

    Args:
        config: of the run.
        context: what stages may use of the run; None leaves them without.

    Raises:
        ConfigError: a stage cannot be found or built, or needs what nothing provides.
    """
    settings = config.algorithm
    stages: list[Hook] = [_baseline(config)]
    if settings.correction.kind is not CorrectionKind.none:
        stages.append(OffPolicyCorrection(settings.correction))
    if settings.kl.coefficient:
        stages.append(_kl(settings.kl, per_token=stages[0].reads_token_rewards))
    if settings.entropy_coefficient:
        stages.append(EntropyBonus(settings.entropy_coefficient))
    for plugin in settings.plugins:
        if is_import_path(plugin.name):
            stages.append(_own(plugin.name, plugin.options))
        else:
            method = PLUGINS[plugin.name]
            stages.append(class_of(method.stage)(**typed_options(method.options, plugin.options)))
    if config.clipo.enabled:
        stages.append(Clipo(config.clipo))
    if config.critic.warmup_steps and any(Signal.values in stage.needs for stage in stages):
        stages.append(CriticWarmup(config.critic.warmup_steps))
    if any(Signal.answers in stage.needs for stage in stages):
        stages.append(Answers())
    algorithm = Algorithm(stages)
    if context is not None:
        algorithm.bind(context)
    return algorithm


def _kl(config: KLConfig, *, per_token: bool) -> Hook:
    if config.place is KLPlace.loss:
        return KLLoss(config.coefficient, config.kind)
    return KLReward(config.coefficient, config.kind, per_token=per_token)


def _baseline(config: RunConfig) -> Hook:
    chosen, method = config.algorithm, baseline(config.algorithm)
    low, high = method.clip or (0.0, 0.0)
    settings = BaselineSettings(
        low if chosen.clip_low is None else chosen.clip_low,
        high if chosen.clip_high is None else chosen.clip_high,
        chosen.aggregation or method.aggregation or Aggregation.token_mean,
        chosen.constant_length or config.rollout.max_new_tokens,
    )
    if is_import_path(chosen.name):
        return _own(chosen.name, chosen.options, settings)
    stage = class_of(BASELINES[chosen.name].stage)
    return stage(settings, **typed_options(method.options, chosen.options))


def class_of(place: str) -> type[Hook]:
    """One of ours, "module:Class"."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"clipo_megatron.algorithms.methods.{module}"), name)


def _own(place: str, options: dict[str, Any], *settings: BaselineSettings) -> Hook:
    """A user's stage, from a file or an installed package."""
    kind = import_hook(place)
    try:
        return kind(*settings, **options)
    except TypeError as error:
        raise ConfigError(f"{place} cannot be built with options {options}: {error}. Correct its options.") from error


def import_hook(place: str) -> type[Hook]:
    """The class at "file.py:Class" or "package.module:Class".

    Raises:
        ConfigError: it cannot be imported, or is no stage.
    """
    kind = imported(place)
    if not (isinstance(kind, type) and issubclass(kind, Hook)):
        raise ConfigError(f"{place} is no subclass of clipo_megatron.algorithms.hook.Stage. Name a class that is one.")
    return kind
