"""The folder of a job, train.output/jobs/<n>: the configuration and script, their origin, and the logs.

config.yaml        the configuration with every setting, and absolute paths
job.sbatch         the script
submission.json    time, commit, interpreter, resources and Slurm's job number
packages.txt       versions of the packages in the submitting environment
key                the servers' API key, readable by its owner alone
job.log, attempts  the script's output, and a line for each start and end of an attempt
logs/              rank<r>.log and servers.<node>.log, over all attempts
environment.<n>.txt, rendezvous/    written by each attempt
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from clipo_megatron import __version__
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.config.yaml_text import literal
from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.runtime.run_dir import JOBS, LOGS
from clipo_megatron.slurm import paths
from clipo_megatron.slurm.resources import Resources, SlurmError

CONFIG, SCRIPT, SUBMISSION = "config.yaml", "job.sbatch", "submission.json"
_GIT_S = 20.0


def resolve(config: RunConfig, resources: Resources) -> RunConfig:
    """The configuration as the job's nodes will read it: absolute paths, the number of servers, a grace period."""
    rollout, serve = config.rollout, config.serve
    servers = rollout.servers
    if rollout.engine is not EngineKind.local and not rollout.endpoints:
        servers = (resources.server_nodes or resources.nodes) * serve.servers
    grace_period_s = (
        config.faults.grace_period_s if config.faults.grace_period_s is not None else resources.grace_period_s / 2
    )
    sync = replace(rollout.sync, folder=paths.absolute(rollout.sync.folder))
    return replace(
        config,
        model=replace(config.model, path=paths.absolute(config.model.path)),
        critic=replace(config.critic, path=paths.absolute(config.critic.path)),
        data=replace(
            config.data,
            train=[paths.source(source) for source in config.data.train],
            eval=[paths.source(source) for source in config.data.eval],
        ),
        algorithm=paths.algorithm(config.algorithm),
        rollout=replace(rollout, servers=servers, sync=sync),
        serve=replace(serve, python=paths.program(serve.python, "serve.python") if serve.python else None),
        faults=replace(config.faults, grace_period_s=grace_period_s),
        train=replace(config.train, output=paths.absolute(config.train.output)),
    )


def next_folder(output: Path) -> Path:
    """The folder of the next job of a run; it does not exist yet."""
    taken = [int(path.name) for path in (output / JOBS).glob("*") if path.name.isdigit()]
    return output / JOBS / f"{max(taken, default=0) + 1:03d}"


def create(folder: Path) -> None:
    """Create a job's folder.

    Raises:
        SlurmError: another submission created it first, or the file system refuses.
    """
    try:
        (folder / LOGS).mkdir(parents=True)
    except FileExistsError:
        raise SlurmError(f"{folder} was just created by another `clipo submit`. Submit again.") from None
    except OSError as error:
        raise SlurmError(f"{folder} cannot be created: {error}. Choose another train.output.") from error


def write(folder: Path, config: RunConfig, script: str, resources: Resources, more: dict[str, Any]) -> None:
    """Write configuration, script and origin; `more` goes into submission.json. The job's number is not known yet."""
    settings = literal(json.loads(json.dumps(asdict(config))))  # enums as their values, tuples as lists
    write_durably(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False, width=10_000))
    write_durably(folder / SCRIPT, script)
    write_durably(folder / "packages.txt", _installed_packages())
    facts = {
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "version": __version__,
        "commit": _commit(),
        "python": sys.executable,
        "directory": str(Path.cwd()),
        "resources": asdict(resources),
        **more,
    }
    write_durably(folder / SUBMISSION, json.dumps(facts, indent=1))


def write_key(folder: Path, name: str) -> None:
    """Write the servers' API key: the value of the environment variable `name`, else a random one."""
    descriptor = os.open(folder / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(os.environ.get(name) or secrets.token_hex(24))


def read_submission(folder: Path) -> dict[str, Any]:
    """The contents of submission.json; {} where it is missing or damaged."""
    try:
        return json.loads((folder / SUBMISSION).read_text())
    except (OSError, ValueError):
        return {}


@cache
def _installed_packages() -> str:
    """Name and version of each package in this environment, a line each."""
    installed = {f"{each.name}=={each.version}\n" for each in distributions()}
    return "".join(sorted(installed, key=str.lower))


@cache
def _commit() -> dict[str, Any]:
    """Commit and changed files of the repository that this package runs from; {} for an installed package."""
    here = Path(__file__).parents[2]
    try:
        head, changed = (
            subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True, timeout=_GIT_S
            ).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"hash": head.strip(), "changed files": [line[3:] for line in changed.splitlines()]}
