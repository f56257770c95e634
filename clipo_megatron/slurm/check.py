"""A job held against its configuration and the plan, before it waits in a queue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clipo_megatron.checks.run import check as check_config
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.planning.architecture import find_architecture, find_critic
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import HARDWARE, Assumptions
from clipo_megatron.planning.layouts import judge
from clipo_megatron.slurm.errors import SubmissionError
from clipo_megatron.slurm.resources import JobKind, Resources


def check(
    config: RunConfig,
    resources: Resources,
    kind: JobKind,
    *,
    config_file: str | Path,
    hardware: str,
    anyway: bool,
    absent: bool = False,
) -> tuple[str, ...]:
    """What the check found that is worth a line.

    Args:
        config: as the nodes will read it.
        resources: of the job.
        kind: of the job.
        config_file: that it comes from; beside it an architecture may stand in for a model that is elsewhere.
        hardware: of the GPUs, by the planner's name.
        anyway: let pass what does not fit.
        absent: whether model and data may be on other machines only.

    Raises:
        ConfigError: the configuration is wrong, also for so many ranks.
        SubmissionError: nodes and configuration do not go together, or the plan says that it does not fit.
        PlanError: the model cannot be divided so.
    """
    if kind.converts:
        return ()
    elsewhere = check_config(config, ranks=resources.ranks, absent=absent, trains=kind is not JobKind.evaluation)
    _check_servers(config, resources)
    missing = tuple(f"not on this machine: {each.key} = {each.value}" for each in elsewhere)
    return (*_check_memory(config, resources, config_file, hardware, anyway), *missing)


def _check_servers(config: RunConfig, resources: Resources) -> None:
    local, gpus = config.rollout.engine is EngineKind.local, resources.gpus_per_node
    serve = config.serve
    if local and resources.server_nodes:
        raise SubmissionError(
            f"--server-nodes {resources.server_nodes}, and rollout.engine = local generates in the training processes. "
            "Set rollout.engine=sglang, or leave --server-nodes out."
        )
    if config.rollout.endpoints and resources.server_nodes:
        raise SubmissionError(
            f"--server-nodes {resources.server_nodes}, and rollout.endpoints names servers that others run. Empty it, "
            "or leave --server-nodes out."
        )
    if local or config.rollout.endpoints or not gpus:
        return
    needed = serve.servers * serve.tp
    if needed > gpus:
        raise SubmissionError(
            f"serve.servers x serve.tp = {serve.servers} x {serve.tp} = {needed} GPUs on each node that serves, and "
            f"--gpus-per-node is {gpus}. Lower one of them."
        )
    if not resources.server_nodes and not config.rollout.colocated:
        raise SubmissionError(
            "servers and ranks would use the same GPUs without taking turns. Set rollout.colocated=true, or give the "
            "servers nodes of their own with --server-nodes."
        )
    if resources.server_nodes and config.rollout.colocated:
        raise SubmissionError(
            f"rollout.colocated = true takes turns on the trainer's GPUs, and --server-nodes {resources.server_nodes} "
            "are others. Set it to false, or leave --server-nodes out."
        )


def _check_memory(
    config: RunConfig, resources: Resources, config_file: str | Path, hardware: str, anyway: bool
) -> tuple[str, ...]:
    if not resources.gpus_per_node:
        return ("no GPUs are asked for, so memory was not held against the plan",)
    if hardware not in HARDWARE:
        raise PlanError(f"hardware {hardware!r} is not in the table; it has {', '.join(HARDWARE)}")
    spec, _ = find_architecture(config.model.path, config_file)
    dp = config.layout.replicas(resources.ranks)
    if config.rollout.engine is EngineKind.local:
        # the plan knows servers only: that of one GPU stands for the model inside each rank
        planned = replace(config, rollout=replace(config.rollout, engine=EngineKind.sglang, colocated=True))
        serving = resources.ranks
    else:
        nodes = resources.server_nodes or resources.nodes
        planned, serving = config, nodes * config.serve.servers * config.serve.tp
    critic = find_critic(config, config_file)
    plan = judge(planned, spec, dp, serving, HARDWARE[hardware], Assumptions(), critic=critic)
    if not plan.fits and not anyway:
        raise SubmissionError(
            f"it does not fit by the plan: {'; '.join(plan.problems)}. `clipo plan CONFIG --gpus {resources.gpus}` "
            "finds layouts that do; --anyway submits this one."
        )
    fullest = max(memory.total for memory in plan.trainer)
    word = "fits" if plan.fits else "does not fit, and is submitted anyway"
    return (
        f"{word}: {fullest / 1e9:.1f} GB of {plan.hardware.memory_bytes / 1e9:.0f} GB on the trainer's fullest GPU; "
        f"about {plan.time.total:.0f} s a step, {plan.tokens_per_s_per_gpu:.0f} tokens/s a GPU ({hardware})",
    )
