"""`clipo plan`: the configured layout judged, and layouts that fit, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipo_megatron.checks.run import requested_ranks
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.architecture import BESIDE, find_architecture, find_critic
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import HARDWARE, Assumptions, Hardware
from clipo_megatron.planning.layouts import LayoutPlan, candidates, judge, server_gpus_of
from clipo_megatron.planning.parameters import active_count, whole_count
from clipo_megatron.weights.spec import ModelSpec

SHOWN = 5  # layouts a number of GPUs


@dataclass(frozen=True, slots=True)
class Options:
    """Of the command line."""

    gpus: tuple[int, ...] = ()  # numbers of GPUs to find layouts for
    hardware: str = "h100"
    assume: tuple[str, ...] = ()  # name=value
    as_json: bool = False
    build: bool = False  # ranks of the configured layout, without memory
    ranks: tuple[int, ...] = ()  # to build; (): all


def plan(config: RunConfig, config_file: str | Path, options: Options, console: Console | None = None) -> int:
    """Print the plan of a configuration, which was read from `config_file`.

    Returns:
        The exit code: 0 if the configured layout fits, or one was found for each number of GPUs; else 1. With
        `options.build` it is 1 as well where a rank holds other parameters than planned.

    Raises:
        PlanError, WeightsError: something that cannot be planned, named.
    """
    if options.build and (options.gpus or options.as_json):
        raise PlanError("--dry-run builds the configured layout and prints a table: leave out --gpus and --json")
    console = console or Console()
    spec, source = find_architecture(config.model.path, config_file)
    critic = find_critic(config, config_file)
    hardware, assume = _hardware(options.hardware), _assumptions(options.assume)
    searched = {gpus: candidates(config, spec, gpus, hardware, assume, critic=critic) for gpus in options.gpus}
    own = None if searched else _configured(config, spec, hardware, assume, critic)
    if options.as_json:
        print(json.dumps(_as_json(spec, own, searched, assume), indent=1))
    else:
        if source.parent.name == BESIDE:
            console.print(f"{config.model.path} is not here; planned from {source}", style="dim", highlight=False)
        _print(console, config, spec, own, searched, hardware, assume)
    sound = own.fits if own else all(searched.values())
    if options.build:
        from clipo_megatron.planning.dry_run import report  # with Megatron, which takes seconds to import

        sound &= report(config, spec, options.ranks or None, console)
    return 0 if sound else 1


def numbers(option: str, text: str, *, least: int = 1) -> tuple[int, ...]:
    """Whole numbers of a command line's option, such as "8,16".

    Raises:
        PlanError: something else, or a number below `least`.
    """
    try:
        found = tuple(int(each) for each in text.split(",") if each.strip())
    except ValueError:
        found = (least - 1,)
    if any(each < least for each in found):
        raise PlanError(f"{option} {text}: it takes whole numbers, such as 8 or 64,128, from {least} on")
    return found


def _configured(
    config: RunConfig, spec: ModelSpec, hardware: Hardware, assume: Assumptions, critic: ModelSpec | None
) -> LayoutPlan:
    ranks = requested_ranks(config.layout)
    dp = ranks // (config.layout.tp * config.layout.pp)
    return judge(config, spec, dp, server_gpus_of(config, ranks), hardware, assume, critic=critic)


def _hardware(name: str) -> Hardware:
    if name not in HARDWARE:
        raise PlanError(f"hardware {name!r} is not in the table; it has {', '.join(HARDWARE)}")
    return HARDWARE[name]


def _assumptions(given: Sequence[str]) -> Assumptions:
    known = {field.name for field in fields(Assumptions)}
    chosen: dict[str, float] = {}
    for each in given:
        name, _, value = each.partition("=")
        try:
            if name not in known:
                raise ValueError
            chosen[name] = float(value)
        except ValueError:
            names = ", ".join(sorted(known))
            raise PlanError(f"--assume {each}: it takes name=number with a name of {names}") from None
    return replace(Assumptions(), **chosen)


# ---------------------------------------------------------------- tables


def _print(
    console: Console,
    config: RunConfig,
    spec: ModelSpec,
    own: LayoutPlan | None,
    searched: dict[int, list[LayoutPlan]],
    hardware: Hardware,
    assume: Assumptions,
) -> None:
    whole = whole_count(spec)
    active = f", {active_count(spec) / 1e9:.1f} B of them for each token" if spec.experts else ""
    console.print(f"{config.name}: {Path(config.model.path).name}, {whole.total / 1e9:.2f} B parameters{active}")
    console.print(
        f"{hardware.name}: {hardware.memory_bytes / 1e9:.0f} GB, {hardware.flops / 1e12:.0f} TFLOP/s, "
        f"{hardware.gpus_per_node} a node; assumed: "
        + ", ".join(f"{name}={value:g}" for name, value in asdict(assume).items()),
        style="dim",
        highlight=False,
    )
    if own is not None:
        _print_plan(console, own)
    for gpus, plans in searched.items():
        _print_layouts(console, gpus, plans)


def _print_plan(console: Console, own: LayoutPlan) -> None:
    division = own.division
    console.print(
        f"\n{own.gpus} GPUs: tp {division.tp} x pp {division.pp} x dp {own.dp}"
        + (f", ep {division.ep} x etp {division.expert_tp}" if division.ep > 1 else "")
        + (", which also generate" if own.colocated else f", and {own.server_gpus} that generate")
        + f"; servers of {own.server_tp}"
    )
    stage = max(range(division.pp), key=lambda each: own.trainer[each].total)
    _print_column(console, f"GB on a GPU of stage {stage}, the fullest", own.trainer[stage].parts, 1e9)
    server = {"weights": own.server.weights, "keys and values": own.server.cache, "reserve": own.server.reserve}
    _print_column(console, "GB on a GPU of a server", server, 1e9)
    phases = ("generate", "score", "update", "sync")
    _print_column(console, "seconds of a step", {name: getattr(own.time, name) for name in phases}, 1.0)
    console.print(
        f"{own.time.tokens / 1e6:.2f} M tokens a step, {own.tokens_per_s_per_gpu:.0f} tokens/s a GPU; an update of the "
        f"servers moves {own.time.sync_bytes / 1e9:.1f} GB"
    )
    for problem in own.problems:
        console.print(f"does not fit: {problem}", style="red")
    if own.fits:
        console.print("fits", style="green")


def _print_layouts(console: Console, gpus: int, plans: list[LayoutPlan]) -> None:
    if not plans:
        console.print(f"\n{gpus} GPUs: no layout fits. Try more GPUs, or smaller layout.max_tokens_per_microbatch.")
        return
    console.print(f"\n{gpus} GPUs: {len(plans)} layouts fit; the cheapest steps:")
    table = Table(box=None, pad_edge=False)
    for name in ("s/step", "generate", "train", "tokens/s/GPU", "GB trainer", "trainer", "servers"):
        table.add_column(name, justify="left" if name in ("trainer", "servers") else "right")
    for each in plans[:SHOWN]:
        division = each.division
        experts = f" ep {division.ep}" if division.ep > 1 else ""
        table.add_row(
            f"{each.time.total:.0f}",
            f"{each.time.generate:.0f}",
            f"{each.time.score + each.time.update:.0f}",
            f"{each.tokens_per_s_per_gpu:.0f}",
            f"{max(memory.total for memory in each.trainer) / 1e9:.1f}",
            f"tp {division.tp} pp {division.pp} dp {each.dp}{experts}" + (" recompute" if each.recompute else ""),
            f"{each.server_gpus // each.server_tp} x {each.server_tp}",
        )
    console.print(table, highlight=False)
    console.print("the first of them: " + " ".join(plans[0].overrides), highlight=False)


def _print_column(console: Console, title: str, values: Mapping[str, float], unit: float) -> None:
    """What is not zero, and the sum."""
    console.print(f"{title}:", highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in values.items():
        if value:
            table.add_row(f"  {name}", f"{value / unit:.1f}")
    table.add_row("  in all", f"{sum(values.values()) / unit:.1f}", style="bold")
    console.print(table)


# ---------------------------------------------------------------- JSON


def _as_json(
    spec: ModelSpec, own: LayoutPlan | None, searched: dict[int, list[LayoutPlan]], assume: Assumptions
) -> dict[str, Any]:
    return {
        "parameters": whole_count(spec).total,
        "active_parameters": active_count(spec),
        "assumptions": asdict(assume),
        "configured": None if own is None else _plan_as_json(own),
        "layouts": {str(gpus): [_plan_as_json(each) for each in plans] for gpus, plans in searched.items()},
    }


def _plan_as_json(each: LayoutPlan) -> dict[str, Any]:
    return {
        "settings": each.overrides,
        "gpus": each.gpus,
        "server_gpus": each.server_gpus,
        "fits": each.fits,
        "problems": list(each.problems),
        "trainer_bytes": [memory.parts for memory in each.trainer],
        "server_bytes": asdict(each.server),
        "seconds": {**asdict(each.time), "total": each.time.total},
        "tokens_per_s_per_gpu": each.tokens_per_s_per_gpu,
    }
