"""`clipo train`: trains a model, or checks everything that can be checked beforehand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from clipo_megatron.cli.ranks import on_ranks

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig, SourceConfig
    from clipo_megatron.data.sources import Row
    from clipo_megatron.runtime.launch import Launch

TRIED = 8  # problems of a generator that --check makes
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
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
    parser.add_argument("--check", action="store_true", help="check everything that can be checked, and train nothing")


def run(options: argparse.Namespace) -> int:
    from clipo_megatron.checks.run import check
    from clipo_megatron.config.load import load
    from clipo_megatron.runtime import launch

    place = launch.from_environment()
    config = load(options.config, options.overrides)
    check(config, ranks=place.world if place else None)
    if options.check:
        return _report(config, place)

    def work() -> None:
        from clipo_megatron.training.trainer import run

        run(config)

    words = ["train", options.config, *options.overrides]
    return on_ranks(options, config, place, work, words, restarts=config.faults.max_restarts)


def _report(config: RunConfig, place: Launch | None) -> int:
    """Read the data and print what the run would do. Of a generator some problems are made, to see that it can."""
    from clipo_megatron.config.errors import ConfigError
    from clipo_megatron.config.model_folder import hf_folder
    from clipo_megatron.data.golds import without_answer
    from clipo_megatron.data.sources import DataError, overlap, without
    from clipo_megatron.rewards.row_checks import check_answers, source_problems, template_text

    found, made = _read(config.data.train)
    held_out, made_held_out = _read(config.data.eval)
    generated = {
        f"reasoning_gym/{each.generator}" for each in [*config.data.train, *config.data.eval] if each.generator
    }
    if problems := [*source_problems(config.reward, {row.data_source for row in [*found, *held_out]} | generated)]:
        raise ConfigError(problems)
    (found, no_answer), (held_out, no_held_out_answer) = without_answer(found), without_answer(held_out)
    check_answers(config, [*found, *held_out], template=template_text(hf_folder(config.model.path)))
    train = without(found, held_out) if config.data.hold_out else found
    if not train and not made:
        raise DataError(
            f"all {len(found)} training problems are also held out, and data.hold_out leaves those out of training. "
            "Give other problems, or set data.hold_out=false."
        )
    if place is not None and place.rank != 0:
        return 0
    layout, ranks = config.layout, place.world if place else config.layout.requested_ranks
    print(f"{config.name}: the configuration is sound.")
    print(f"  ranks     {ranks} = tp {layout.tp} x pp {layout.pp} x dp {layout.replicas(ranks)}")
    prompts, samples = config.data.prompts_per_step, config.rollout.samples_per_prompt
    print(f"  a step    {prompts} prompts x {samples} samples = {prompts * samples} rollouts")
    problems = len(train) + made
    epochs = config.train.steps * prompts / problems
    print(f"  training  {problems} problems, {config.train.steps} steps = {epochs:.3g} epochs")
    of_files = " of files" if made or made_held_out else ""
    shared = f", {overlap(train, held_out)}{of_files} also trained on" if held_out else ""
    left_out = len(found) - len(train)
    shared += f"; {left_out} training problems are among them and left out" if left_out else ""
    print(f"  held out  {len(held_out) + made_held_out} problems{shared}")
    if unanswered := [*no_answer, *no_held_out_answer]:
        names = ", ".join(row.id for row in unanswered[:5])
        print(f"  left out  {len(unanswered)} problems whose answer is an empty \\boxed{{}}: {names}")
    print(f"  output    {config.train.output}")
    return 0


def _read(sources: Sequence[SourceConfig]) -> tuple[list[Row], int]:
    """The rows of all files, and the number of problems that generators will make."""
    from clipo_megatron.data.sources import read_all

    generated = [source for source in sources if source.generator]
    read_all([replace(source, size=min(source.size or 0, TRIED)) for source in generated])
    rows = read_all([source for source in sources if not source.generator])
    return rows, sum(source.size or 0 for source in generated)
