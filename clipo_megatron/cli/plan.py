"""`clipo plan`: memory and time of the configured layout, or of the layouts of a number of GPUs that fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from clipo_megatron.cli.arguments import add_config
from clipo_megatron.cli.numbers import whole_numbers
from clipo_megatron.config.ranges import range_violation
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import HARDWARE, Assumptions, Hardware
from clipo_megatron.runtime.warning_filters import quiet_libraries

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig
    from clipo_megatron.planning.layouts import LayoutPlan
    from clipo_megatron.weights.spec import ModelSpec

DESCRIPTION = """\
Memory on each GPU, part by part, and the time of a step, phase by phase, before anything is queued.

Needs the model's config.json, no weights and no GPU. Parameters are counted as the ranks will build them. Times follow
from the GPUs' data sheets and assumed shares of their rates: good for comparing layouts, no promise.

With --gpus, the layouts of so many GPUs that fit, cheapest step first; else the configured one. --dry-run builds every
rank of that with Megatron, without memory, and compares its parameters with the plan. The exit code is 1 if none fits,
or a rank is not as planned.
"""
EXAMPLES = """\
examples:
  clipo plan run.yaml                                   the layout as it is configured
  clipo plan run.yaml layout.tp=8 layout.pp=4 layout.dp=2 serve.servers=8 serve.tp=4
  clipo plan run.yaml --gpus 64,128 --hardware h200     layouts to choose from
  clipo plan run.yaml --gpus 64 rollout.colocated=true --json
  clipo plan run.yaml --assume train_flops=0.3 --assume mean_response=0.8
  clipo plan run.yaml --measured proof.json             with the rates that `clipo prove` measured
  clipo plan run.yaml --dry-run --rank 0,63             build two ranks, as a check of the plan
"""


def ranks(text: str) -> tuple[int, ...] | None:
    """A type for argparse: numbers of ranks; None where the text names none."""
    return whole_numbers(text, least=0) or None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--gpus", metavar="N,N", type=whole_numbers, default=(), help="find layouts for these numbers of GPUs"
    )
    parser.add_argument(
        "--hardware", help="a100 (80 GB), h100, h200, b200 or mi300x; default that of --measured, or h100"
    )
    parser.add_argument("--measured", metavar="FILE", help="use what `clipo prove` measured in place of assumptions")
    parser.add_argument("--assume", action="append", default=[], metavar="name=number", help="change an assumption")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dry-run", action="store_true", help="build the layout's ranks without memory, and compare")
    parser.add_argument("--rank", metavar="N,N", type=ranks, help="with --dry-run: build these ranks alone")


def run(options: argparse.Namespace) -> int:
    """Print the plan.

    Returns:
        0 if the configured layout fits, or one was found for each number of GPUs; else 1. With --dry-run it is 1 as
        well where a rank holds other parameters than planned.

    Raises:
        ConfigError: the section `megatron` is wrong.
        PlanError, WeightsError: something that cannot be planned, named.
    """
    from rich.console import Console

    from clipo_megatron.checks.megatron import megatron_problems
    from clipo_megatron.config.errors import ConfigError
    from clipo_megatron.config.load import load
    from clipo_megatron.planning.architecture import ARCHITECTURES, find_architecture, find_critic
    from clipo_megatron.planning.layouts import search_layouts
    from clipo_megatron.planning.tables import as_json, print_plan

    build = options.dry_run or options.rank is not None
    if build and (options.gpus or options.json):
        raise PlanError("--dry-run builds the configured layout and prints a table: leave out --gpus and --json")
    quiet_libraries()
    config, console = load(options.config, options.overrides), Console(soft_wrap=True)
    if wrong := [each for each in megatron_problems(config) if not each.absent]:
        raise ConfigError(wrong, origin=str(options.config))  # the section changes what a plan counts
    spec, source = find_architecture(config.model.path, options.config)
    critic = find_critic(config, options.config)
    hardware, assume = _machine(options)
    searched = {count: search_layouts(config, spec, count, hardware, assume, critic=critic) for count in options.gpus}
    own = None if searched else _configured(config, spec, hardware, assume, critic)
    if options.json:
        print(json.dumps(as_json(spec, own, searched, assume), indent=1))
    else:
        if source.parent.name == ARCHITECTURES:
            console.print(f"{config.model.path} is not here; planned from {source}", style="dim", highlight=False)
        print_plan(console, config, spec, own, searched, hardware, assume)
    sound = own.fits if own else all(searched.values())
    if build:
        from clipo_megatron.planning.dry_run import report  # with Megatron, which takes seconds to import

        sound &= report(config, spec, options.rank, console)
    return 0 if sound else 1


def _configured(
    config: RunConfig, spec: ModelSpec, hardware: Hardware, assume: Assumptions, critic: ModelSpec | None
) -> LayoutPlan:
    from clipo_megatron.planning.layouts import plan_layout, server_gpus_of

    ranks = config.layout.requested_ranks
    dp = config.layout.replicas(ranks)
    return plan_layout(config, spec, dp, server_gpus_of(config, ranks), hardware, assume, critic=critic)


def _machine(options: argparse.Namespace) -> tuple[Hardware, Assumptions]:
    """The GPUs and the assumptions; --assume is more than what was measured, and that more than a default."""
    if options.measured is None:
        return _hardware(options.hardware or "h100"), _assumptions(options.assume)
    from clipo_megatron.planning.measured import read_measured

    hardware, measured = read_measured(options.measured)
    if options.hardware not in (None, hardware.name):
        raise PlanError(
            f"--hardware {options.hardware}: {options.measured} was measured on {hardware.name}. Leave out one of them."
        )
    return hardware, _assumptions(options.assume, measured)


def _hardware(name: str) -> Hardware:
    if name not in HARDWARE:
        raise PlanError(f"--hardware {name}: the table has no such GPU. Choose one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def _assumptions(given: Sequence[str], measured: Mapping[str, float] = MappingProxyType({})) -> Assumptions:
    known = {field.name: field for field in fields(Assumptions)}
    chosen = dict(measured)
    for each in given:
        name, _, value = each.partition("=")
        try:
            chosen[name], default = float(value), known[name].default
        except (ValueError, KeyError):
            names = ", ".join(sorted(known))
            raise PlanError(f"--assume {each}: it takes name=number with a name of {names}") from None
        if (reason := range_violation(known[name], chosen[name])) is not None:
            raise PlanError(f"--assume {each}: {reason}. The default is {default:g}.")
    return replace(Assumptions(), **chosen)
