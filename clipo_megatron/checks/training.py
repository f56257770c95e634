"""Checks of settings that make sense only together with others."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.algorithms.methods.registry import plugins
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import Anchors, BonusForm, ClipoConfig, RunConfig


def training_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Settings of `clipo`, `optimizer`, `checkpoint` and `reward` that make no sense together."""
    optimizer, clipo, reward = config.optimizer, config.clipo, config.reward
    if optimizer.min_learning_rate > optimizer.learning_rate:
        reason = f"it lies above optimizer.learning_rate = {optimizer.learning_rate}"
        yield ConfigProblem("optimizer.min_learning_rate", reason, "Lower it", optimizer.min_learning_rate)
    if clipo.enabled and 0 < config.train.steps <= clipo.warmup_steps:
        reason = f"the run has train.steps = {config.train.steps}, so the head would never give a bonus"
        yield ConfigProblem("clipo.warmup_steps", reason, "Lower it", clipo.warmup_steps)
    if clipo.enabled and clipo.anchors is Anchors.wrong and clipo.weight:
        reason = "a bonus goes to correct anchors alone, so none would ever be paid"
        remedy = "Set it to correct or both, or clipo.weight to 0 to train the head without a bonus"
        yield ConfigProblem("clipo.anchors", reason, remedy, clipo.anchors)
    if clipo.enabled:
        yield from _unread_by_ratio(clipo)
    else:
        yield from _without_bonus(config)
    if config.checkpoint.keep_best and not (config.data.eval and config.eval.every):
        reason = "checkpoints are compared by held-out accuracy, and none is measured during training"
        remedy = "Give data.eval problems and set eval.every, or set it to 0"
        yield ConfigProblem("checkpoint.keep_best", reason, remedy, config.checkpoint.keep_best)
    if not reward.correct_reward > reward.wrong_reward:
        reason = f"a right answer must earn more than a wrong one (reward.wrong_reward = {reward.wrong_reward})"
        yield ConfigProblem("reward.correct_reward", reason, "Raise it", reward.correct_reward)


def _without_bonus(config: RunConfig) -> Iterator[ConfigProblem]:
    """Plug-ins that have nothing to act on where CLIPO is off."""
    kinds = plugins(config.algorithm)
    pays = any(kind.bonus is not Hook.bonus for kind in kinds)
    for index, (plugin, kind) in enumerate(zip(config.algorithm.plugins, kinds, strict=True)):
        key = f"algorithm.plugins[{index}].name"
        if Signal.embeddings in kind.needs:
            yield ConfigProblem(key, "it reads embeddings, and there is no head", "Set clipo.enabled=true", plugin.name)
        if kind.shape_bonus is not Hook.shape_bonus and not pays:
            reason = "it shapes bonuses, and nothing pays any"
            yield ConfigProblem(key, reason, "Set clipo.enabled=true, or add a plug-in that pays one", plugin.name)


def _unread_by_ratio(clipo: ClipoConfig) -> Iterator[ConfigProblem]:
    """Settings of the bonus that clipo.bonus = ratio does not read."""
    if clipo.bonus is not BonusForm.ratio:
        return
    plain = ClipoConfig()
    for name in ("floor", "constant", "calibrate"):
        if (value := getattr(clipo, name)) != getattr(plain, name):
            reason = "with clipo.bonus = ratio the bonus is standardised and made of no loss, so it would be ignored"
            remedy = f"Leave it at {str(getattr(plain, name)).lower()}, or set clipo.bonus to paper or expected"
            yield ConfigProblem(f"clipo.{name}", reason, remedy, value)
