"""Checks of the section `report`: what would otherwise fail when the first metrics are written."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RunConfig, WandbMode


def report_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Packages that are not installed, and names of projects that Weights & Biases does not take."""
    report = config.report
    if report.tensorboard and util.find_spec("tensorboard") is None:
        reason = "the package tensorboard is not installed"
        remedy = "pip install tensorboard, or set it to false: metrics.jsonl has the same numbers"
        yield ConfigProblem("report.tensorboard", reason, remedy, True, absent=True)
    if report.wandb.mode is not WandbMode.disabled:
        if util.find_spec("wandb") is None:
            reason = "the package wandb is not installed"
            remedy = "pip install wandb, or set it to disabled: metrics.jsonl has the same numbers"
            yield ConfigProblem("report.wandb.mode", reason, remedy, report.wandb.mode, absent=True)
        if not report.wandb.project or set(report.wandb.project) & set("/\\#?%:"):
            reason = "it names a project of Weights & Biases"
            remedy = "Give a name without any of / \\ # ? % :"
            yield ConfigProblem("report.wandb.project", reason, remedy, report.wandb.project)
