"""A run's output folder: the names of everything in it, and the lock by which one run at a time writes to it.

config.json            settings of the run              checkpoints/   step_<n>/ each
segments.jsonl         settings of each session
metrics.jsonl          one line per step                    eval/          step_<n>.json, by training
rollouts.jsonl         texts of some rollouts           results/       step_<n>.json, by `clipo eval`
prompts.jsonl          what became of each prompt       states/        step_<n>.safetensors: pooled hidden states
trace.jsonl            phases of each rank's steps
tensorboard/, wandb/   files of these tools             logs/          output of ranks and servers
servers/               a record of each server          weights/       weights on their way to servers
jobs/<n>/              Slurm jobs                       scale/         measurements of `clipo scale`
prompts/               prompts as the ranks map them    previous/<n>/  results of runs that were started over
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TextIO

from clipo_megatron.config.model_folder import read_run_settings
from clipo_megatron.runtime.durable_files import LockedError, lock

SETTINGS = "config.json"
SEGMENTS = "segments.jsonl"
METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"
LEDGER = "prompts.jsonl"
TRACE = "trace.jsonl"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "eval"
EVAL_RESULTS = "results"
STATES = "states"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
LOGS = "logs"
SERVERS = "servers"
WEIGHTS = "weights"
PROMPTS = "prompts"
JOBS = "jobs"
SCALE = "scale"
PREVIOUS = "previous"
RESULTS = (
    METRICS, ROLLOUTS, LEDGER, CHECKPOINTS, EVALUATIONS, EVAL_RESULTS, TENSORBOARD, WANDB, STATES, TRACE, SETTINGS,
    SEGMENTS,
)  # fmt: skip
STEP_NAMES = "step_*"  # a pattern of what `step_name` returns
_LOCK = ".lock"
_LOCK_WAIT_S = 5.0  # a killed run holds its lock until its last process is gone


class OutputError(RuntimeError):
    """The output folder cannot be used; the message says which process holds it, or what else is wrong."""


def step_name(step: int) -> str:
    """The name of what belongs to a step, such as its checkpoint: "step_000010"."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step of a folder that `step_name` named."""
    return int(path.name.removeprefix("step_"))


def lock_output(output: Path) -> TextIO | None:
    """Create the output folder and lock it until the returned file is closed or this process ends; for rank 0.

    Returns:
        The lock; None on file systems without locks.

    Raises:
        OutputError: another run holds the lock, or the folder cannot be created.
    """
    refuse_unwritable(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        return lock(output / _LOCK, wait_s=_LOCK_WAIT_S)
    except LockedError as locked:
        raise OutputError(
            f"{locked.holder} is writing to train.output = {output}. Wait for it, end it, or choose another "
            "train.output."
        ) from None
    except OSError as error:
        raise OutputError(f"train.output = {output} cannot be written to: {error}. Choose another one.") from error


def refuse_unwritable(output: Path) -> None:
    """Refuse an output folder that cannot be created or written to; nothing is left on the disk.

    Raises:
        OutputError: it is a file, or the folder or the nearest one above it takes no files.
    """
    folder = output.absolute()
    try:
        while not folder.exists() and folder != folder.parent:
            if folder.is_symlink():
                raise FileNotFoundError(f"{folder} is a link to {os.readlink(folder)}, which is not there")
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = f"{folder}: {error.strerror}" if getattr(error, "strerror", None) else str(error)
        raise OutputError(f"train.output = {output} cannot be written to: {reason}. Choose another one.") from error


def is_run_folder(output: Path) -> bool:
    """Whether a run has written to a folder."""
    return (output / _LOCK).exists() or (output / SEGMENTS).exists() or bool(read_run_settings(output / SETTINGS))


def foreign_result(output: Path, file: Path | None = None) -> str:
    """The name of a result in an output folder that no run has written there; "" if there is none.

    Args:
        output: the folder.
        file: None: whether any of the names of results is taken in a folder that is no run's. A file: whether it is
            what a run would write under such a name, whoever has written it.
    """
    if file is not None:
        return next((name for name in RESULTS if file.is_relative_to(output / name)), "")
    if is_run_folder(output):
        return ""
    return next((name for name in RESULTS if os.path.lexists(output / name)), "")


def set_aside(output: Path) -> Path | None:
    """Move the results of earlier runs into a new folder below <output>/previous; for rank 0.

    Returns:
        That folder; None if there was nothing to move.
    """
    found = [path for name in RESULTS if (path := output / name).exists()]
    if not found:
        return None
    previous = output / PREVIOUS
    previous.mkdir(exist_ok=True)
    numbers = [int(path.name) for path in previous.iterdir() if path.name.isdigit()]
    folder = previous / str(max(numbers, default=0) + 1)
    folder.mkdir()
    for path in found:
        os.replace(path, folder / path.name)
    return folder


def was_set_aside(output: Path) -> tuple[str, ...]:
    """A value that changes when a run starts over: the names below previous/, and whether there are no results."""
    previous = output / PREVIOUS
    names = sorted(path.name for path in previous.iterdir()) if previous.is_dir() else []
    return (*names, "empty" if not any((output / name).exists() for name in RESULTS) else "")


def newest_checkpoint(output: Path) -> str:
    """The name of the newest checkpoint's folder; empty if there is none."""
    names = [path.name for path in (output / CHECKPOINTS).glob(STEP_NAMES)]
    return max(names, key=lambda name: (len(name), name), default="")
