"""Checks of a job before it is queued: configuration, servers and GPUs, planned memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clipo_megatron.checks.contents import check_contents
from clipo_megatron.checks.run import check as check_config
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.planning.architecture import find_architecture, find_critic
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import HARDWARE, Assumptions
from clipo_megatron.planning.layouts import plan_layout
from clipo_megatron.slurm.resources import JobKind, Resources, SlurmError


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
    """Check a job; returns remarks for the user, a line each.

    Args:
        config: the configuration as the nodes will read it.
        resources: what the job asks for.
        kind: what the job does.
        config_file: the file that the configuration comes from; an architecture beside it stands in for a model that
            is not on this machine.
        hardware: the GPUs, by their name in the planner's table.
        anyway: accept a job that does not fit into memory by the plan.
        absent: whether model and data may be missing on this machine.

    Raises:
        ConfigError: the configuration is wrong, or does not suit the number of ranks.
        SlurmError: nodes and configuration contradict each other, or the job does not fit by the plan.
        PlanError: the model cannot be divided by this layout.
    """
    if kind.converts:
        return ()
    elsewhere = check_config(config, ranks=resources.ranks, absent=absent, trains=kind is not JobKind.evaluation)
    _check_servers(config, resources)
    check_contents(config, trains=kind is not JobKind.evaluation, absent={each.key for each in elsewhere}, light=True)
    missing = tuple(f"not on this machine: {each.key} = {each.value}" for each in elsewhere)
    return (*_check_memory(config, resources, config_file, hardware, anyway), *missing)


def _check_servers(config: RunConfig, resources: Resources) -> None:
    local, gpus = config.rollout.engine is EngineKind.local, resources.gpus_per_node
    serve = config.serve
    if local and resources.server_nodes:
        raise SlurmError(
            f"--server-nodes is {resources.server_nodes}, and rollout.engine = local generates in the training "
            "processes. Set rollout.engine=sglang, or leave --server-nodes out."
        )
    if config.rollout.endpoints and resources.server_nodes:
        raise SlurmError(
            f"--server-nodes is {resources.server_nodes}, and rollout.endpoints names servers that run already. "
            "Empty it, or leave --server-nodes out."
        )
    if local or config.rollout.endpoints or not gpus:
        return
    needed = serve.servers * serve.tp
    if needed > gpus:
        raise SlurmError(
            f"serve.servers x serve.tp = {serve.servers} x {serve.tp} = {needed} GPUs on each node that serves, and "
            f"--gpus-per-node is {gpus}. Lower one of them."
        )
    if not resources.server_nodes and not config.rollout.colocated:
        raise SlurmError(
            "servers and ranks would use the same GPUs at the same time. Set rollout.colocated=true, so that they take "
            "turns, or give the servers nodes of their own with --server-nodes."
        )
    if resources.server_nodes and config.rollout.colocated:
        raise SlurmError(
            f"rollout.colocated = true lets servers and ranks take turns on the same GPUs, and --server-nodes "
            f"{resources.server_nodes} gives the servers others. Set it to false, or leave --server-nodes out."
        )


def _check_memory(
    config: RunConfig, resources: Resources, config_file: str | Path, hardware: str, anyway: bool
) -> tuple[str, ...]:
    if not resources.gpus_per_node:
        return ("no GPUs are asked for, so memory was not checked against the plan",)
    if hardware not in HARDWARE:
        raise PlanError(f"hardware {hardware!r} is not in the table; it has {', '.join(HARDWARE)}")
    spec, _ = find_architecture(config.model.path, config_file)
    dp = config.layout.replicas(resources.ranks)
    if config.rollout.engine is EngineKind.local:
        # The plan knows servers only: a server on one GPU stands for the local engine's model in each rank.
        planned = replace(config, rollout=replace(config.rollout, engine=EngineKind.sglang, colocated=True))
        serving = resources.ranks
    else:
        nodes = resources.server_nodes or resources.nodes
        planned, serving = config, nodes * config.serve.servers * config.serve.tp
    critic = find_critic(config, config_file)
    plan = plan_layout(planned, spec, dp, serving, HARDWARE[hardware], Assumptions(), critic=critic)
    if not plan.fits and not anyway:
        raise SlurmError(
            f"the job does not fit by the plan: {'; '.join(plan.problems)}. "
            f"`clipo plan CONFIG --gpus {resources.gpus}` finds layouts that do; --anyway submits this one."
        )
    fullest = max(memory.total for memory in plan.trainer)
    verdict = "fits" if plan.fits else "does not fit, and is submitted anyway"
    return (
        f"{verdict}: {fullest / 1e9:.1f} GB of {plan.hardware.memory_bytes / 1e9:.0f} GB on the trainer's fullest GPU; "
        f"about {plan.time.total:.0f} s per step, {plan.tokens_per_s_per_gpu:.0f} tokens/s per GPU ({hardware})",
    )
