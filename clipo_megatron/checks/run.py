"""Checks what a configuration asks for, so that nothing of it goes wrong only once models, data or ranks are there.

Ranges of single settings are declared beside their fields, in the schema. What is checked here needs several settings,
a method's class, the model's config.json, or the file system; no check reads weights or data.
"""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.checks.batch import batch_problems
from clipo_megatron.checks.data import data_problems
from clipo_megatron.checks.evaluation import evaluation_problems
from clipo_megatron.checks.layout import layout_problems
from clipo_megatron.checks.megatron import megatron_problems
from clipo_megatron.checks.methods import method_problems
from clipo_megatron.checks.model import model_problems
from clipo_megatron.checks.output import output_problems
from clipo_megatron.checks.report import report_problems
from clipo_megatron.checks.rollout import rollout_problems
from clipo_megatron.checks.training import training_problems
from clipo_megatron.checks.windows import window_problems
from clipo_megatron.config.errors import CONTROL, ConfigError, ConfigProblem
from clipo_megatron.config.ranges import range_problems
from clipo_megatron.config.schema import RunConfig


def check(
    config: RunConfig, *, ranks: int | None = None, absent: bool = False, trains: bool = True
) -> list[ConfigProblem]:
    """Check the whole configuration: in itself, and against the model folder, the data files and the number of ranks.

    Args:
        config: the configuration.
        ranks: how many a launcher has started; None: no launcher, so the layout's `requested_ranks` will be started.
        absent: whether model and data may be missing on this machine.
        trains: whether it is to train; an evaluation needs neither training problems nor batches and methods that fit.

    Returns:
        With `absent`, the problems of things that are missing on this machine; otherwise nothing.

    Raises:
        ConfigError: all problems found, numbered, each with value, reason and remedy.
    """
    found = list(_problems(config, ranks, trains))
    elsewhere = [each for each in found if each.absent and absent]
    if problems := [each for each in found if each not in elsewhere]:
        raise ConfigError(problems)
    return elsewhere


def _problems(config: RunConfig, ranks: int | None, trains: bool) -> Iterator[ConfigProblem]:
    if not config.name or "/" in config.name or CONTROL.search(config.name):
        reason, remedy = "it becomes a folder's name", "Use a name without a slash or control characters"
        yield ConfigProblem("name", reason, remedy, config.name)
    yield from output_problems(config)
    yield from layout_problems(config.layout, ranks)
    yield from model_problems(config, config.layout.replicas(ranks), trains=trains)
    yield from data_problems(config, ("train", "eval") if trains else ("eval",))
    if trains:
        yield from batch_problems(config, ranks)
    yield from range_problems(config)
    yield from training_problems(config)
    yield from megatron_problems(config)
    yield from rollout_problems(config)
    yield from evaluation_problems(config)
    if trains:
        yield from window_problems(config)
        yield from method_problems(config)
        yield from report_problems(config)
