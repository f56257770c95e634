"""Checks of how many prompts and rollouts a step has: whether mini-batches, replicas and methods can work with them."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.algorithms.methods.registry import base_method
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import Level, RunConfig


def batch_problems(config: RunConfig, ranks: int | None) -> Iterator[ConfigProblem]:
    prompts, mini, samples = (
        config.data.prompts_per_step,
        config.algorithm.mini_batches,
        config.rollout.samples_per_prompt,
    )
    key = "data.prompts_per_step"
    if prompts >= 1 and mini >= 1 and prompts % mini:
        near = f"{prompts // mini * mini or mini} or {(prompts // mini + 1) * mini}"
        near = str(mini) if prompts < mini else near
        reason = f"algorithm.mini_batches = {mini} does not divide it, and a group is never split"
        yield ConfigProblem(key, reason, f"Set it to {near}, or change algorithm.mini_batches", prompts)
    replicas = config.layout.replicas(ranks)
    if 1 <= prompts < replicas:
        reason = f"there are {replicas} model replicas, and each needs at least one prompt"
        yield ConfigProblem(key, reason, f"Set it to {replicas} or more, or use fewer ranks", prompts)
    elif mini >= 1 and samples >= 1 and mini <= prompts:
        yield from _mini_batches(config, replicas)
    if samples == 1 and (asking := _compares(config)):
        reason = f"{asking}, and a group of one has nothing to compare"
        yield ConfigProblem("rollout.samples_per_prompt", reason, "Set it to 2 or more; 8 or 16 are usual", samples)


def _mini_batches(config: RunConfig, replicas: int) -> Iterator[ConfigProblem]:
    """Mini-batches with fewer rollouts than there are replicas."""
    prompts, mini = config.data.prompts_per_step, config.algorithm.mini_batches
    # With windows a prompt may have a single rollout that has not ended before.
    windows, samples = config.rollout.window_tokens is not None, config.rollout.samples_per_prompt
    each = 1 if windows else samples
    if prompts // mini * each < replicas:
        counted = f"{prompts // mini} prompts, each with as few as one rollout that goes on"
        counted = counted if windows else f"{prompts // mini} prompts with {samples} rollouts each"
        reason = f"a mini-batch has {counted}, and not all of the {replicas} model replicas would get one"
        remedy = f"Set it to {mini * -(-replicas // each)} or more, or lower algorithm.mini_batches"
        yield ConfigProblem("data.prompts_per_step", reason, remedy, prompts)


def _compares(config: RunConfig) -> str | None:
    """What needs several rollouts of a prompt, as a clause; None if nothing does."""
    clipo, algorithm = config.clipo, config.algorithm
    if clipo.enabled and clipo.level is not Level.batch:
        return f"CLIPO with clipo.level = {clipo.level.value} compares the rollouts of a prompt"
    if not base_method(algorithm).needs_groups:
        return None
    if base_method(algorithm).default_aggregation is None:
        return f"the loss of {algorithm.name} compares the rollouts of a prompt"
    return f"the advantages of {algorithm.name} are against the prompt's other rollouts"
