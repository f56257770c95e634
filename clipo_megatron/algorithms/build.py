"""From a configuration to an algorithm: the base method, its terms, the plug-ins and CLIPO."""

from __future__ import annotations

from typing import Any

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.clipo.hook import Clipo
from clipo_megatron.algorithms.hook import Hook, HookContext, Signal
from clipo_megatron.algorithms.importance import OffPolicyCorrection, correction_of
from clipo_megatron.algorithms.kl import LARGEST_RELEASED_LOG_RATIO, EntropyBonus, KLLoss, KLReward
from clipo_megatron.algorithms.methods.empo import Answers
from clipo_megatron.algorithms.methods.ppo import CriticWarmup
from clipo_megatron.algorithms.methods.registry import base_method_class, plugin_class
from clipo_megatron.algorithms.policy_loss import PolicyLoss, PolicyLossSettings
from clipo_megatron.config.errors import ConfigError, is_for_users
from clipo_megatron.config.load import typed_options
from clipo_megatron.config.schema import Aggregation, CorrectionKind, KLConfig, KLPlace, RunConfig


def build_algorithm(config: RunConfig, context: HookContext | None = None) -> Algorithm:
    """The algorithm of a configuration.

    Args:
        config: the run's configuration.
        context: what hooks may use of the run; None leaves them unbound.

    Raises:
        ConfigError: a hook cannot be found or built, or needs what nothing provides.
    """
    settings, base, correction = config.algorithm, _base_method(config), correction_of(config)
    hooks: list[Hook] = [base]
    if correction.kind is not CorrectionKind.none:
        hooks.append(OffPolicyCorrection(correction))
    if settings.kl.coefficient:
        hooks.append(_kl_hook(settings.kl, per_token=base.reads_token_rewards, clamped=settings.released_clamps))
    if settings.entropy_coefficient:
        hooks.append(EntropyBonus(settings.entropy_coefficient))
    for plugin in settings.plugins:
        hooks.append(_build_hook(plugin.name, plugin_class(plugin.name), plugin.options))
    if config.clipo.enabled:
        hooks.append(Clipo(config.clipo))
    if config.critic.warmup_steps and any(Signal.values in hook.needs for hook in hooks):
        hooks.append(CriticWarmup(config.critic.warmup_steps))
    if any(Signal.answers in hook.needs for hook in hooks):
        hooks.append(Answers())
    algorithm = Algorithm(hooks, config.clipo.place)
    if context is not None:
        algorithm.bind(context)
    return algorithm


def _kl_hook(config: KLConfig, *, per_token: bool, clamped: bool) -> Hook:
    if config.place is KLPlace.loss:
        return KLLoss(config.coefficient, config.kind, clamped=clamped)
    return KLReward(config.coefficient, config.kind, per_token=per_token)


def _base_method(config: RunConfig) -> PolicyLoss:
    algorithm = config.algorithm
    chosen = base_method_class(algorithm.name)
    low, high = chosen.default_clip or (0.0, 0.0)
    settings = PolicyLossSettings(
        low if algorithm.clip_low is None else algorithm.clip_low,
        high if algorithm.clip_high is None else algorithm.clip_high,
        algorithm.aggregation or chosen.default_aggregation or Aggregation.token_mean,
        algorithm.constant_length or config.rollout.max_new_tokens,
        algorithm.dual_clip,
        LARGEST_RELEASED_LOG_RATIO if algorithm.released_clamps else None,
    )
    return _build_hook(algorithm.name, chosen, algorithm.options, settings)


def _build_hook(name: str, chosen: type[Any], options: dict[str, Any], *settings: PolicyLossSettings) -> Any:
    try:
        return chosen(*settings, typed_options(chosen.options_class, options))
    except TypeError as error:
        takes = "(settings, options)" if settings else "(options)"
        raise ConfigError(f"{name} cannot be built: {error}. Let its constructor take {takes}.") from error
    except Exception as error:  # a user's constructor can raise anything
        if is_for_users(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{name} cannot be built: its constructor raises {reason}. Correct it.") from error
