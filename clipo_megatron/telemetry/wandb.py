"""A sink for Weights & Biases, online or into a folder that `wandb sync` uploads."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipo_megatron.config.packages import why
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.telemetry.sinks import MissingPackageError, ReportError

if TYPE_CHECKING:
    from clipo_megatron.flow import StepReport

IDENTITY = "run.json"  # holds the service's id of this run, so that a resumed run continues it


class Wandb:
    """One run of the service, however often ours is resumed.

    Args:
        config: the configuration of the run, which the service shows.
        folder: where the service's library writes; its name is `wandb`.
        from_step: the first step to report. The service ignores steps that it already has.

    Raises:
        MissingPackageError: wandb, or something that it needs, is not installed.
        ReportError: the service refuses the run or cannot be reached.
    """

    def __init__(self, config: RunConfig, folder: Path, *, from_step: int):
        try:
            import wandb
        except Exception as error:
            reason, remedy = why("wandb", error)
            raise MissingPackageError(
                f"report.wandb.mode is {config.report.wandb.mode.value}, but {reason}: {remedy}, or set "
                "report.wandb.mode=disabled (metrics.jsonl has the same numbers)"
            ) from error
        chosen = config.report.wandb
        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / IDENTITY
        known = json.loads(identity.read_text()) if from_step and identity.exists() else {}
        try:
            self._run: Any = wandb.init(
                project=chosen.project,
                entity=chosen.entity,
                name=chosen.run or config.name,
                group=chosen.group,
                mode=chosen.mode.value,
                id=known.get("id"),
                resume="allow" if known else None,
                dir=str(folder.parent),  # the library itself adds the folder `wandb`
                settings=wandb.Settings(silent=True, console="off"),  # the reporter prints what there is to say
                config=json.loads(json.dumps(asdict(config), default=str)),
            )
        except wandb.Error as error:
            raise ReportError(
                f"Weights & Biases did not accept the run (report.wandb.mode = {chosen.mode.value}, "
                f"project {chosen.project}): {error}. Run `wandb login`, or set the mode to offline or disabled"
            ) from error
        write_durably(identity, json.dumps({"id": self._run.id}))

    def write(self, report: StepReport) -> None:
        finite = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
        self._run.log(finite, step=report.step)

    def close(self) -> None:
        """Finish the run there. Idempotent."""
        if self._run is not None:
            self._run.finish()
            self._run = None
