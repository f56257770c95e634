"""Checks of the section `report`: what would otherwise fail when the first metrics are written."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.packages import unusable
from clipo_megatron.config.schema import RunConfig, WandbMode


def report_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Packages that cannot be used, and names of projects that Weights & Biases does not take."""
    report = config.report
    # What torch's writer imports of it; torch itself is not imported here.
    if report.tensorboard and (problem := unusable("tensorboard", "tensorboard.summary.writer.event_file_writer")):
        reason, remedy = problem
        remedy += ", or set it to false: metrics.jsonl has the same numbers"
        yield ConfigProblem("report.tensorboard", reason, remedy, True, absent=True)
    if report.wandb.mode is not WandbMode.disabled:
        if problem := unusable("wandb"):
            reason, remedy = problem
            remedy += ", or set it to disabled: metrics.jsonl has the same numbers"
            yield ConfigProblem("report.wandb.mode", reason, remedy, report.wandb.mode, absent=True)
        if not report.wandb.project or set(report.wandb.project) & set("/\\#?%:"):
            reason = "it names a project of Weights & Biases"
            remedy = "Give a name without any of / \\ # ? % :"
            yield ConfigProblem("report.wandb.project", reason, remedy, report.wandb.project)
