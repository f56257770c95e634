"""`clipo serve`: starts the servers that generate for a training run, and keeps them running."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from clipo_megatron.cli.arguments import add_config
from clipo_megatron.config.errors import counted
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.serving import environment
from clipo_megatron.serving.commands import api_key, server_command, url
from clipo_megatron.serving.gpus import gpus
from clipo_megatron.serving.process import REDACTED
from clipo_megatron.serving.serve import serve, slots_of

DESCRIPTION = """\
Run the servers that generate for the training run that CONFIG describes, until Ctrl-C.

They are started as `model`, `rollout` and `serve` say, with any further options of the sections `sglang` and `vllm`,
registered in train.output/servers, where `clipo train` finds them, and started again when they die or hang. Their logs
are in train.output/logs. On a machine without a GPU the engine gets an environment of its own, once.
"""
EXAMPLES = """\
examples:
  clipo serve run.yaml rollout.engine=sglang serve.servers=2
  clipo serve run.yaml --check                  show the command lines, and start nothing
  clipo serve run.yaml serve.tp=4 sglang.mem_fraction_static=0.8 serve.python=envs/sglang/bin/python
  CLIPO_API_KEY=... clipo serve run.yaml serve.host=0.0.0.0

Train with the same file and overrides: clipo train run.yaml rollout.engine=sglang
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--check", action="store_true", help="print what would be started, and start nothing")


def run(options: argparse.Namespace) -> int:
    config = load(options.config, options.overrides)
    return report_check(config) if options.check else serve(config)


def report_check(config: RunConfig) -> int:
    """Print what `serve` would start, and start nothing."""
    found, reason = gpus()
    slots, key = slots_of(config, found), api_key(config)
    engine = config.rollout.engine.value
    print(f"{config.name}: {counted(len(slots), f'{engine} server')} for {config.train.output}")
    print(f"  GPUs         {len(found) or f'none ({reason})'}")
    python, remark = _planned_interpreter(engine, config.serve.python, len(found))
    print(f"  interpreter  {python}{remark}")
    named = config.rollout.api_key_env
    print(f"  key          {f'from {named}' if key else 'none: only this machine reaches the servers'}")
    for slot in slots:
        command = server_command(config, slot, python=python, key=key, scratch=Path("PRIVATE"))
        words = {name: REDACTED if key and value == key else value for name, value in command.environment.items()}
        print(f"\nserver {slot.index}, {url(config.serve.host, slot.port)}")
        print("  " + " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(words.items())))
        print("  " + shlex.join(command.arguments))
    return 0


def _planned_interpreter(engine: str, given: str | None, count: int) -> tuple[Path, str]:
    """The interpreter that `environment.interpreter` would choose, and a remark; sets nothing up."""
    recipe = environment.RECIPES[engine]
    if given is None and count == 0 and not recipe.is_ready and not environment.importable(engine):
        return recipe.python, f" (to be set up: about {recipe.minutes:.0f} minutes, {recipe.gigabytes:.1f} GB)"
    return environment.interpreter(engine, given, gpus=count), ""
