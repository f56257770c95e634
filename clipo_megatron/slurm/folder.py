"""The folder of a job, train.output/jobs/<n>: what was submitted, from which code and surroundings, and its logs.

config.yaml      the configuration, every setting resolved, paths absolute
job.sbatch       the script
submission.json  when, by which commit and interpreter, with which resources; the job's number
packages.txt     versions of the packages that submitted it
key              of the servers, readable by its owner alone
job.log          what the script says, over all attempts; attempts has a line for each start and end
logs/            rank<r>.log and servers.<node>.log, over all attempts
environment.<n>.txt, rendezvous/    of each attempt
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import asdict, fields, is_dataclass, replace
from enum import Enum
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from clipo_megatron import __version__
from clipo_megatron.config.schema import EngineKind, RunConfig, SourceConfig
from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.slurm.errors import SubmissionError
from clipo_megatron.slurm.resources import Resources

JOBS, CONFIG, SCRIPT, SUBMISSION = "jobs", "config.yaml", "job.sbatch", "submission.json"
_GIT_S = 20.0


def settle(config: RunConfig, resources: Resources) -> RunConfig:
    """A configuration as the job's nodes will read it: absolute paths, and as many servers as the nodes have."""
    rollout, serve = config.rollout, config.serve
    servers = rollout.servers
    if rollout.engine is not EngineKind.local and not rollout.endpoints:
        servers = (resources.server_nodes or resources.nodes) * serve.servers
    grace_period_s = (
        config.faults.grace_period_s if config.faults.grace_period_s is not None else resources.ranks_stop_s / 2
    )
    sync = replace(rollout.sync, folder=_absolute(rollout.sync.folder))
    return replace(
        config,
        model=replace(config.model, path=_absolute(config.model.path)),
        data=replace(
            config.data,
            train=[_placed(source) for source in config.data.train],
            eval=[_placed(source) for source in config.data.eval],
        ),
        rollout=replace(rollout, servers=servers, sync=sync),
        serve=replace(serve, python=_absolute(serve.python)),
        faults=replace(config.faults, grace_period_s=grace_period_s),
        train=replace(config.train, output=_absolute(config.train.output)),
    )


def next_folder(output: Path) -> Path:
    """Of the next job of a run; not made yet."""
    taken = [int(path.name) for path in (output / JOBS).glob("*") if path.name.isdigit()]
    return output / JOBS / f"{max(taken, default=0) + 1:03d}"


def make(folder: Path) -> None:
    """Make a job's folder.

    Raises:
        SubmissionError: it cannot be made, or somebody else made it this moment.
    """
    try:
        (folder / "logs").mkdir(parents=True)
    except FileExistsError:
        raise SubmissionError(f"{folder} was made by another `clipo submit` this moment. Submit again.") from None
    except OSError as error:
        raise SubmissionError(f"{folder} cannot be made: {error}. Choose another train.output.") from error


def write(folder: Path, config: RunConfig, script: str, resources: Resources, more: dict[str, Any]) -> None:
    """Fill it, but for the job's number."""
    write_durably(folder / CONFIG, yaml.safe_dump(_plain(config), sort_keys=False, width=10_000))
    write_durably(folder / SCRIPT, script)
    installed = sorted({f"{each.name}=={each.version}" for each in distributions()}, key=str.lower)
    write_durably(folder / "packages.txt", "\n".join(installed) + "\n")
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
    """The servers' key: the one that the environment variable `name` has, else a new one."""
    descriptor = os.open(folder / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(os.environ.get(name) or secrets.token_hex(24))


def read_submission(folder: Path) -> dict[str, Any]:
    """What `write` wrote; {} where there is nothing that can be read."""
    try:
        return json.loads((folder / SUBMISSION).read_text())
    except (OSError, ValueError):
        return {}


def _commit() -> dict[str, Any]:
    """Of the repository that this package runs from; {} for an installed one."""
    here = Path(__file__).parents[2]
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=_GIT_S).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"hash": head.strip(), "changed files": [line[3:] for line in changed.splitlines()]}


def _plain(value: Any) -> Any:
    """Of a configuration, as YAML writes it."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _placed(source: SourceConfig) -> SourceConfig:
    return replace(source, path=_absolute(source.path))


def _absolute(path: str | None) -> str | None:
    """Without following links: a link may be how all nodes know a place."""
    return path if path is None else os.path.abspath(path)
