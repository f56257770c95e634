"""Finds the checkpoint that is meant where a command is given the folder of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipo_megatron.config.model_folder import is_checkpoint
from clipo_megatron.conversion.conversion import ConversionError
from clipo_megatron.runtime.manifest import manifest_defects
from clipo_megatron.runtime.run_dir import CHECKPOINTS, STEP_NAMES, step_of


def newest_step(path: Path, say: Callable[[str], None] = print) -> Path:
    """Return the newest complete checkpoint of the run's folder `path`; any other path is returned as it is.

    Args:
        path: of a run, of its checkpoints, of one checkpoint, or of anything else.
        say: called with a line that names the step which was taken.

    Raises:
        ConversionError: the run has checkpoints, and none of them is complete.
    """
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = [each for each in folder.glob(STEP_NAMES) if each.name.removeprefix("step_").isdigit() and each.is_dir()]
    if is_checkpoint(path) or not steps:
        return path
    steps.sort(key=step_of, reverse=True)
    for step in steps:
        if not manifest_defects(step, contents=False):
            left = f"; {steps[0].name} is newer and not complete" if step != steps[0] else ""
            say(f"{path} is a run: taking its newest checkpoint, {step.name}{left}")
            return step
    raise ConversionError(
        f"no checkpoint in {folder} is complete: {manifest_defects(steps[0], contents=False)[0]}. Restore the file, or "
        "give the folder of another checkpoint"
    )
