"""A job held against its configuration and the plan, before it waits in a queue."""

from __future__ import annotations

from dataclasses import replace

from clipo_megatron.config.checks import check as check_config
from clipo_megatron.config.checks import data_parallel
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import HARDWARE, Assumptions
from clipo_megatron.planning.layouts import judge
from clipo_megatron.submission.errors import SubmissionError
from clipo_megatron.submission.resources import Kind, Resources
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import read_config


def check(config: RunConfig, resources: Resources, kind: Kind, *, hardware: str, anyway: bool) -> tuple[str, ...]:
    """What the check found that is worth a line.

    Raises:
        ConfigError: the configuration is wrong, also for so many ranks.
        SubmissionError: nodes and configuration do not go together, or the plan says that it does not fit.
        PlanError: the model cannot be divided so.
    """
    if kind.converts:
        return ()
    check_config(config, ranks=resources.ranks)
    _check_servers(config, resources)
    return _check_memory(config, resources, hardware, anyway)


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


def _check_memory(config: RunConfig, resources: Resources, hardware: str, anyway: bool) -> tuple[str, ...]:
    if not resources.gpus_per_node:
        return ("no GPUs are asked for, so memory was not held against the plan",)
    if hardware not in HARDWARE:
        raise PlanError(f"hardware {hardware!r} is not in the table; it has {', '.join(HARDWARE)}")
    spec = model_spec(read_config(config.model.path))
    dp = data_parallel(config.layout, resources.ranks)
    if config.rollout.engine is EngineKind.local:
        # the plan knows servers only: that of one GPU stands for the model inside each rank
        planned = replace(config, rollout=replace(config.rollout, engine=EngineKind.sglang, colocated=True))
        serving = resources.ranks
    else:
        nodes = resources.server_nodes or resources.nodes
        planned, serving = config, nodes * config.serve.servers * config.serve.tp
    plan = judge(planned, spec, dp, serving, HARDWARE[hardware], Assumptions())
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
