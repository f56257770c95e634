"""`clipo train`: trains a model, or checks everything that can be checked beforehand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.cli.arguments import add_config
from clipo_megatron.cli.ranks import on_ranks

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig, SourceConfig
    from clipo_megatron.runtime.launcher_env import Launch

DESCRIPTION = """\
Train a model as CONFIG, a YAML file, says. `key=value` overrides settings; values are YAML.

Without a launcher, a layout of several ranks is started on this machine, and Ctrl-C ends the run after its step.
Under torchrun or srun this process is one of the ranks.
"""
EXAMPLES = """\
examples:
  clipo train run.yaml
  clipo train run.yaml layout.pp=2 clipo.weight=0.1 name=weak-bonus
  clipo train run.yaml 'data.train=[{path: train.parquet, suffix: " Think."}]' data.train[0].size=1000
  clipo train run.yaml model.system_prompt= reward.by_source='{my/set: math}' --check

`clipo settings` lists every key.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, what="YAML file")
    parser.add_argument("--check", action="store_true", help="check everything that can be checked, and train nothing")


def run(options: argparse.Namespace) -> int:
    from clipo_megatron.checks.run import check
    from clipo_megatron.config.load import load
    from clipo_megatron.runtime import launcher_env

    place = launcher_env.this_process()
    options.is_reported_by_another = launcher_env.is_reported_by_another()
    config = load(options.config, options.overrides)
    check(config, ranks=place.world if place else None)
    if options.check:
        return _report(config, place)
    if launcher_env.leads(place):
        _prepare(config, place)

    def work() -> None:
        from clipo_megatron.training.trainer import run

        run(config)

    words = ["train", options.config, *options.overrides]
    return on_ranks(options, config, place, work, words, restarts=config.faults.max_restarts)


def _prepare(config: RunConfig, place: Launch | None) -> None:
    """Check what the run reads as --check does, and make its prompts, which all of its ranks then find."""
    from clipo_megatron.checks.contents import check_contents
    from clipo_megatron.runtime.run_dir import PROMPTS

    starts_ranks = place is None and config.layout.requested_ranks > 1
    check_contents(config, folder=Path(config.train.output) / PROMPTS, light=starts_ranks)


def _report(config: RunConfig, place: Launch | None) -> int:
    """Read what the run reads and print what it would do. Of a generator some problems are made, to see that it can."""
    if place is not None and place.rank != 0:
        return 0
    from clipo_megatron.checks.contents import check_contents, unread_files

    contents = check_contents(config, light=True)
    layout, ranks, train = config.layout, place.world if place else config.layout.requested_ranks, contents.train
    print(f"{config.name}: the configuration is sound.")
    context = f" x cp {layout.cp}" if layout.cp > 1 else ""
    print(f"  ranks     {ranks} = tp {layout.tp}{context} x pp {layout.pp} x dp {layout.replicas(ranks)}")
    prompts, samples = config.data.prompts_per_step, config.rollout.samples_per_prompt
    print(f"  a step    {prompts} prompts x {samples} samples = {prompts * samples} rollouts")
    problems = len(train) + _not_made(config.data.train)
    epochs = config.train.steps * prompts / problems
    longest = f"; prompts of up to {max(train.lengths())} tokens"
    print(f"  training  {problems} problems, {config.train.steps} steps = {epochs:.3g} epochs{longest}")
    held_out, shared = contents.held_out, ""
    if held_out is not None and (trained_on := len(held_out) - len(held_out.without(train))):
        shared = f", {trained_on} also trained on"
    print(f"  held out  {len(held_out or ()) + _not_made(config.data.eval)} problems{shared}")
    for remark in contents.remarks:
        print(f"            {remark}")
    for file, unread in unread_files(config):
        print(f"  not read  {', '.join(unread)} of {file}")
    print(f"  output    {config.train.output}")
    return 0


def _not_made(sources: Sequence[SourceConfig]) -> int:
    """The number of problems that generators will make, without those that were made to try them."""
    from clipo_megatron.checks.contents import TRIED

    return sum(max((source.size or 0) - TRIED, 0) for source in sources if source.generator)
