"""Submits a job: resolves the configuration, checks it, writes the job's folder and calls sbatch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.config.load import load
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.runtime.run_dir import CHECKPOINTS, JOBS, newest_checkpoint
from clipo_megatron.slurm import folder as folders
from clipo_megatron.slurm import paths
from clipo_megatron.slurm.check import check
from clipo_megatron.slurm.container import IMAGE_DEADLINE_S, command_within, environments, mounted, steps_within
from clipo_megatron.slurm.nodes import fitted, node_facts
from clipo_megatron.slurm.resources import JobKind, Resources, SlurmError
from clipo_megatron.slurm.script import Setting, directives_of, render, template_of

_SLURM_S = 60.0  # time for Slurm's controller to answer
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "")


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job that was rendered, and submitted unless it was a dry run."""

    folder: Path
    script: str
    ranks: int
    gpus: int
    id: str | None = None  # Slurm's number; None after a dry run
    remarks: tuple[str, ...] = ()  # what the checks found, a line each


def submit(
    config_file: str | Path,
    overrides: Sequence[str],
    resources: Resources,
    *,
    kind: JobKind = JobKind.train,
    target: Path | None = None,
    hardware: str = "h100",
    anyway: bool = False,
    dry_run: bool = False,
) -> SlurmJob:
    """Submit a job.

    Args:
        config_file: the run's YAML file.
        overrides: `key=value` settings, as for `clipo train`.
        resources: what the job asks for.
        kind: what the job does.
        target: the folder that a conversion writes.
        hardware: the GPUs, by their name in the planner's table.
        anyway: submit a job that does not fit into the GPUs by the plan, too.
        dry_run: render and check only; model and data need not be on this machine.

    Raises:
        ConfigError, SlurmError, PlanError: what is wrong, and what to change.
    """
    resources.check()
    if resources.gpus_per_node:
        resources = fitted(resources, node_facts(resources.partition, resources.gpu_type))
    resources = replace(
        resources, python=paths.program(resources.python, "--python", must_exist=not resources.container)
    )
    if kind.converts:  # in one process on one node
        cpus = resources.cpus_per_rank and resources.ranks_a_node * resources.cpus_per_rank
        resources = replace(resources, nodes=1, ranks_per_node=1, cpus_per_rank=cpus)
    written = load(config_file, overrides)
    config = folders.resolve(written, resources)
    # What is said of a model that is not there should name it as the user did: it may be meant for a model hub.
    known = dry_run or os.path.exists(config.model.path)
    checked = config if known else replace(config, model=written.model)
    remarks = check(checked, resources, kind, config_file=config_file, hardware=hardware, anyway=anyway, absent=dry_run)
    output = Path(config.train.output)
    folder = folders.next_folder(output)
    settings = _settings(config, folder, resources, kind, target)
    script = render(
        template_of(kind, resources),
        directives=directives_of(config.name, folder, resources),
        settings=settings,
        setup=_setup(config, resources),
    )
    gpus = resources.gpus
    if dry_run:
        return SlurmJob(folder, script, resources.ranks, gpus, remarks=remarks)
    if not shutil.which("sbatch"):
        raise SlurmError("there is no sbatch here. Submit from a login node of the cluster, or see --dry-run.")
    if kind is JobKind.train:
        _refuse_second_job(output)
    folders.create(folder)
    folders.write(
        folder, config, script, resources, {"kind": kind.value, "overrides": list(overrides), "remarks": list(remarks)}
    )
    if config.rollout.engine is not EngineKind.local:
        folders.write_key(folder, config.rollout.api_key_env)
    number = _sbatch(folder)
    facts = folders.read_submission(folder)
    write_durably(folder / folders.SUBMISSION, json.dumps({**facts, "job": number}, indent=1))
    return SlurmJob(folder, script, resources.ranks, gpus, number, remarks)


def job_state(number: str) -> str:
    """State of a job: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT...; "" once Slurm has forgotten it.

    Raises:
        SlurmError: Slurm's controller does not answer.
    """
    done = _ask("scontrol", "--oneliner", "show", "job", number)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SlurmError(f"Slurm does not tell the state of job {number}: {done.stderr.strip()}. Try again later.")
    found = re.search(r"\bJobState=(\w+)", done.stdout)
    return found[1] if found else ""


def _settings(
    config: RunConfig, folder: Path, resources: Resources, kind: JobKind, target: Path | None
) -> dict[str, Setting]:
    output = Path(config.train.output)
    python = resources.python or ("python3" if resources.container else sys.executable)
    clipo = [python, "-m", "clipo_megatron.cli"]
    inputs = [config.model.path, *(each.path for each in (*config.data.train, *config.data.eval) if each.path)]
    inputs += [config.critic.path] if config.critic.path else []
    inputs += paths.files_of(config.algorithm)
    found: dict[str, Setting] = {
        "JOB": str(folder),
        "OUTPUT": str(output),
        "CLIPO": command_within(python) if resources.container else clipo,
        "ENGINE": config.rollout.engine.value if not config.rollout.endpoints and not kind.converts else "local",
        "NODES": resources.nodes,
        "SERVER_NODES": resources.server_nodes,
        "RANKS": resources.ranks,
        "RANKS_PER_NODE": resources.ranks_a_node,
        "CPUS_PER_RANK": resources.cpus_per_rank or 0,
        "STOP_BEFORE": max(10, resources.stop_before_s),
        "REQUEUES": resources.requeues,
        "RESTARTS": resources.restarts,
        "RANKS_DEADLINE": resources.ranks_deadline_s,
        "NODES_DEADLINE": max(resources.nodes_deadline_s, IMAGE_DEADLINE_S if resources.container else 0),
    }
    if kind.converts:
        if target is None:
            raise SlurmError(f"--job {kind.value} needs the folder that it writes. Give --target FOLDER.")
        found["CONVERSION"] = _conversion(config, kind, Path(os.path.abspath(target)))
    # Each node looks for these within the container, if there is one; a bare name is found by its PATH.
    found["MUST_SEE"] = [*([python] if "/" in python else []), *inputs]
    found["CONTAINER"] = _container(config, output, [*inputs, target], resources)
    return found


def _container(config: RunConfig, output: Path, inputs: Sequence[str | Path | None], resources: Resources) -> list[str]:
    """What the steps of a job run within; [] without a container."""
    if not resources.container:
        return []
    pythons = environments(resources) + ([config.serve.python] if config.serve.python else [])
    return steps_within(resources, mounted(resources, output, [*inputs, config.rollout.sync.folder], pythons))


def _conversion(config: RunConfig, kind: JobKind, target: Path) -> list[str]:
    """The arguments of `clipo convert`."""
    if kind is JobKind.to_megatron:
        layout = config.layout
        sizes = {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "etp": layout.etp}
        sizes |= {"first-layers": layout.first_stage_layers, "last-layers": layout.last_stage_layers}
        layout_options = [f"--{name}={value}" for name, value in sizes.items() if value is not None]
        return [kind.value, config.model.path, str(target), *layout_options]
    output = Path(config.train.output)
    if not (name := newest_checkpoint(output)):
        raise SlurmError(f"{config.train.output} has no checkpoint to convert. Correct train.output.")
    return [kind.value, str(output / CHECKPOINTS / name), str(target)]


def _setup(config: RunConfig, resources: Resources) -> str:
    lines = [resources.setup] if resources.setup else []
    if config.rollout.engine is not EngineKind.local:
        lines.append(f'export {config.rollout.api_key_env}=$(cat "$JOB/key")')
    return "\n".join(lines)


def _refuse_second_job(output: Path) -> None:
    """Raise a SlurmError if a job that trains into `output` is queued or runs: only one can hold the run's lock."""
    for folder in sorted((output / JOBS).glob("*")):
        facts = folders.read_submission(folder)
        number = facts.get("job")
        if facts.get("kind") == JobKind.train.value and number and job_state(number) not in OVER:
            raise SlurmError(
                f"job {number} trains into {output} already, or is about to. Cancel it (scancel {number}), or choose "
                "another train.output."
            )


def _sbatch(folder: Path) -> str:
    done = _ask("sbatch", "--parsable", str(folder / folders.SCRIPT))
    number = done.stdout.strip().partition(";")[0]
    if done.returncode or not number.isdigit():
        raise SlurmError(
            f"sbatch refuses {folder / folders.SCRIPT}: {(done.stderr or done.stdout).strip()}. Change what it names, "
            "for example with --partition, --account, --time or --sbatch."
        )
    return number


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]} does not answer: {error}. Try again when Slurm answers.") from error
