"""The folder that a run writes to: one run at a time, and a run that starts over mixes with nothing older."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from clipo_megatron.runtime.durable_files import Held, lock

METRICS, ROLLOUTS, CHECKPOINTS = "metrics.jsonl", "rollouts.jsonl", "checkpoints"
EVALUATIONS, TENSORBOARD, WANDB, SETTINGS = "eval", "tensorboard", "wandb", "config.json"
MEASURED = "results"  # of `clipo eval`; those of training itself are in EVALUATIONS
STATES, TRACE = "states", "trace.jsonl"
RESULTS = (
    METRICS,
    ROLLOUTS,
    CHECKPOINTS,
    EVALUATIONS,
    MEASURED,
    TENSORBOARD,
    WANDB,
    STATES,
    TRACE,
    SETTINGS,
)
PREVIOUS = "previous"  # <output>/previous/<n>/ holds the results of runs that were started over
_LOCK_WAIT_S = 5.0  # a killed run lets go when its last process is gone


class OutputError(RuntimeError):
    """The output folder cannot be used; the message says by whom it is, or why not."""


def claim(output: Path) -> TextIO | None:
    """Make the folder and hold it until this process ends; for rank 0.

    Returns:
        The lock, to be kept; None on file systems without locks.

    Raises:
        OutputError: another run holds it, or it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        return lock(output / ".lock", wait_s=_LOCK_WAIT_S)
    except Held as held:
        raise OutputError(
            f"{held.holder} is writing to train.output = {output}. Wait for it, end it, or choose another train.output."
        ) from None
    except OSError as error:
        raise OutputError(f"train.output = {output} cannot be written to: {error}. Choose another one.") from error


def set_aside(output: Path) -> Path | None:
    """Move the results of earlier runs to a folder of their own under `output`; for rank 0.

    Returns:
        That folder; None if there was nothing to move.
    """
    found = [path for name in RESULTS if (path := output / name).exists()]
    if not found:
        return None
    shelf = output / PREVIOUS
    shelf.mkdir(exist_ok=True)
    taken = [int(path.name) for path in shelf.iterdir() if path.name.isdigit()]
    folder = shelf / str(max(taken, default=0) + 1)
    folder.mkdir()
    for path in found:
        os.replace(path, folder / path.name)
    return folder


def was_set_aside(output: Path) -> tuple[str, ...]:
    """What tells whether a run has started over: the folders of earlier ones, and whether there is anything at all."""
    shelf = output / PREVIOUS
    names = sorted(path.name for path in shelf.iterdir()) if shelf.is_dir() else []
    return (*names, "empty" if not any((output / name).exists() for name in RESULTS) else "")


def newest_checkpoint(output: Path) -> str:
    """Name of the newest checkpoint's folder; empty where there is none."""
    return max(
        (path.name for path in (output / CHECKPOINTS).glob("step_*")), key=lambda name: (len(name), name), default=""
    )
