"""Finds the checkpoint that is meant where a command is given the folder of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipo_megatron.checkpoint.retention import complete, defect, newest_first
from clipo_megatron.config.model_folder import is_checkpoint
from clipo_megatron.conversion.conversion import ConversionError
from clipo_megatron.runtime.run_dir import CHECKPOINTS


def newest_step(path: Path, say: Callable[[str], None] = print) -> Path:
    """Return the newest complete checkpoint of the run's folder `path`; any other path is returned as it is.

    Args:
        path: of a run, of its checkpoints, of one checkpoint, or of anything else.
        say: called with a line that names the step which was taken.

    Raises:
        ConversionError: the run has checkpoints, and none of them is complete.
    """
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if is_checkpoint(path) or not (steps := newest_first(folder)):
        return path
    if not (whole := complete(folder)):
        raise ConversionError(
            f"no checkpoint in {folder} is complete: of {steps[0].name}, {defect(steps[0])}. Restore the file, or give "
            "the folder of another checkpoint"
        )
    left = f"; {steps[0].name} is newer and not complete" if steps[0] != whole[-1] else ""
    say(f"{path} is a run: taking its newest checkpoint, {whole[-1].name}{left}")
    return whole[-1]
