"""Checks of rollout.window_tokens."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.algorithms.methods.registry import base_method, max_refill_rounds, plugins
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RunConfig


def window_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Settings that do not work with rollouts that grow from step to step."""
    rollout, algorithm = config.rollout, config.algorithm
    key, window = "rollout.window_tokens", rollout.window_tokens
    if window is None:
        return
    if window >= rollout.max_new_tokens:
        reason = f"no response is longer than rollout.max_new_tokens = {rollout.max_new_tokens}"
        yield ConfigProblem(key, reason, "Set it below, or to null for whole responses", window)
    if not base_method(algorithm).supports_windows:
        reason = f"{algorithm.name} does not learn from responses that have not ended"
        yield ConfigProblem(key, reason, "Set it to null, or algorithm.name to t_ppo", window)
    for plugin, method in zip(algorithm.plugins, plugins(algorithm), strict=True):
        if not method.supports_windows:
            reason = f"the plug-in {plugin.name} judges whole responses"
            yield ConfigProblem(key, reason, f"Set it to null, or remove {plugin.name} from algorithm.plugins", window)
    if rollout.over_sampling > 1:
        reason = "with windows nothing is left unfinished by over-sampling"
        yield ConfigProblem("rollout.over_sampling", reason, f"Set it to 1, or {key} to null", rollout.over_sampling)
    if max_refill_rounds(config):
        reason = "groups in windows have no verdicts yet by which to replace them"
        yield ConfigProblem(
            "rollout.max_refill_rounds", reason, f"Set it to 0, or {key} to null", max_refill_rounds(config)
        )
    if config.layout.share_prompts:
        reason = "rollouts of a group that grow in windows go on from different tokens"
        yield ConfigProblem("layout.share_prompts", reason, f"Leave it unset, or set {key} to null", True)
