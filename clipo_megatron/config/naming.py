"""The name of a run that its configuration does not give: that of its file, so that two files never share a folder.

Until this was so, every run without a name was called `run` and lay in runs/run. Such a run is found again if its
settings are those of the file; otherwise a line says where it is.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipo_megatron.config.differences import differences, plain
from clipo_megatron.config.model_folder import read_run_settings
from clipo_megatron.config.schema import RunConfig

_FORMER = "run"  # the name that all runs without one had
_RUNS = Path("runs")
# What may change while a run goes on without becoming another one.
_MAY_DIFFER = ("name", "train.output", "train.steps", "checkpoint.", "eval.", "report.", "faults.", "serve.", "layout.")


def name_after(file: Path, content: dict[str, Any]) -> bool:
    """Name a run after its configuration file unless its content has a name; returns whether it did."""
    if "name" in content:
        return False
    content["name"] = file.stem
    return True


def at_its_former_place(config: RunConfig, file: Path) -> RunConfig:
    """The configuration of a run that was named after its file, in its former folder if it was begun there."""
    former, place = _RUNS / _FORMER, _RUNS / config.name
    if config.name == _FORMER or Path(config.train.output) != place or place.exists():
        return config
    settings = read_run_settings(former / "config.json")
    if settings is None or settings.get("name") != _FORMER:
        return config
    if found := differences(settings, plain(config), ignore=_MAY_DIFFER):
        _say(
            f"{former} holds a run of another configuration ({found[0].key} and so on differ); this one is named after "
            f"{file.name}, and lies in {place}. To go on with the other one, add name={_FORMER}"
        )
        return config
    _say(
        f"{file.name} gives no name, and its run was begun in {former}, where all runs without a name lay; it goes on "
        f"there. Write `name: {_FORMER}` into the file to keep it there for good"
    )
    return replace(config, name=_FORMER, train=replace(config.train, output=str(former)))


def _say(line: str) -> None:
    """Print a line on rank 0."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"clipo: {line}", file=sys.stderr)
