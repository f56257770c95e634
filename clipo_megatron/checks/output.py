"""Checks of the folder that a run writes to: nothing in it may be somebody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from clipo_megatron.config.errors import CONTROL, ConfigProblem
from clipo_megatron.config.model_folder import is_checkpoint
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.runtime.run_dir import foreign_result, is_run_folder

_REMEDY = "Choose a folder of its own, such as runs/NAME"


def output_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Problems of train.output: places in which a run would overwrite, or mix itself with, what it has not written."""
    key, value = "train.output", config.train.output
    if CONTROL.search(value):
        yield ConfigProblem(key, "it has a control character, such as the end of a line", _REMEDY, repr(value))
        return
    try:
        output = Path(value).resolve()
        reason = _reason(output, config)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, NUL
        yield ConfigProblem(key, f"it is no path of this machine ({error})", _REMEDY, value)
        return
    if reason:
        yield ConfigProblem(key, reason, _REMEDY, value)


def _reason(output: Path, config: RunConfig) -> str:
    if output in (Path("/"), Path.home().resolve()):
        return "it is the home folder, or the root of the file system"
    if (output / ".git").exists():
        return "it is the root of a repository"
    if output == Path.cwd().resolve() and not is_run_folder(output):
        return "it is the current folder, in which no run has written yet"
    for setting, path in (("model.path", config.model.path), ("critic.path", config.critic.path)):
        if path and output == Path(path).resolve():
            return f"it is the model's folder, {setting}"
    if inside := next((each for each in (output, *output.parents) if is_checkpoint(each)), None):
        return f"it is in a checkpoint, {inside}"
    for source in (*config.data.train, *config.data.eval):
        if source.path and (written := foreign_result(output, Path(source.path).resolve())):
            return f"the run would write its {written} over {source.path}, which it reads"
    if name := foreign_result(output):
        return f"it holds {name}, which no run has written there and this one would overwrite"
    return ""
