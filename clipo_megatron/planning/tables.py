"""What `clipo plan` shows: the configured layout or those found, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.hardware import Assumptions, Hardware
from clipo_megatron.planning.layouts import LayoutPlan, indistinct
from clipo_megatron.planning.parameters import active_count, whole_count
from clipo_megatron.planning.timing import fp8_rate
from clipo_megatron.weights.spec import ModelSpec

SHOWN = 5  # layouts shown for each number of GPUs


def print_plan(
    console: Console,
    config: RunConfig,
    spec: ModelSpec,
    own: LayoutPlan | None,
    searched: dict[int, list[LayoutPlan]],
    hardware: Hardware,
    assume: Assumptions,
) -> None:
    """Print the model, the assumptions, and the configured layout (`own`) or those found for each number of GPUs."""
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
    _print_precision(console, config, hardware, assume)
    if own is not None:
        _print_configured(console, own)
    for gpus, plans in searched.items():
        _print_layouts(console, gpus, plans, assume)


def _print_precision(console: Console, config: RunConfig, hardware: Hardware, assume: Assumptions) -> None:
    """Say what a plan makes of the section's FP8 and FP4."""
    if rate := fp8_rate(config, hardware, assume):
        gained = rate / (hardware.flops * assume.train_flops)
        console.print(
            f"megatron.fp8: layers' products take {1 / gained:.0%} of their time in bf16; attention and the output "
            "layer stay in bf16",
            highlight=False,
        )
    if config.megatron.get("fp4") is not None:
        console.print("megatron.fp4: planned as bf16, since what it gains is not known", highlight=False)


def _print_configured(console: Console, own: LayoutPlan) -> None:
    division = own.division
    console.print(
        f"\n{own.gpus} GPUs: tp {division.tp}{f' x cp {own.cp}' if own.cp > 1 else ''} x pp {division.pp} x dp {own.dp}"
        + (f", ep {division.ep} x etp {division.expert_tp}" if division.ep > 1 else "")
        + (", which also generate" if own.colocated else f", and {own.server_gpus} that generate")
        + f"; servers of {own.server_tp}"
    )
    stage = max(range(division.pp), key=lambda each: own.trainer[each].total)
    _print_column(console, f"GB on a GPU of stage {stage}, the fullest", own.trainer[stage].parts, 1e9)
    server = {
        "weights": own.server.weights,
        "keys and values": own.server.cache,
        "reserve": own.server.reserve,
        "trainer": own.server.trainer,
    }
    _print_column(console, "GB on a GPU of a server", server, 1e9)
    _print_column(console, "GB of a node's host", own.host.parts, 1e9)
    phases = ("generate", "score", "update", "sync")
    beside = ", generation beside score and update" if own.time.ahead else ""
    seconds = {name: getattr(own.time, name) for name in phases}
    _print_column(console, f"seconds of a step{beside}", seconds, 1.0, total=own.time.total)
    if own.fits and not own.colocated:
        ages = f"; tokens are {own.time.mean_age:.1f} updates old in the mean, {own.time.ahead} at most"
        console.print(
            f"ranks wait for rollouts in {own.time.trainer_idle:.0%} of a step, servers are idle in "
            f"{own.time.server_idle:.0%}{ages if own.time.ahead else ''}",
            highlight=False,
        )
    console.print(
        f"{own.time.tokens / 1e6:.2f} M tokens a step, {own.tokens_per_s_per_gpu:.0f} tokens/s a GPU; an update of the "
        f"servers moves {own.time.sync_bytes / 1e9:.1f} GB"
    )
    for problem in own.problems:
        console.print(f"does not fit: {problem}", style="red")
    if own.fits:
        console.print("fits", style="green")


def _print_layouts(console: Console, gpus: int, plans: list[LayoutPlan], assume: Assumptions) -> None:
    if not plans:
        console.print(f"\n{gpus} GPUs: no layout fits. Try more GPUs, or smaller layout.max_tokens_per_microbatch.")
        return
    console.print(f"\n{gpus} GPUs: {len(plans)} layouts fit; the shortest steps:")
    table = Table(box=None, pad_edge=False)
    for name in ("s/step", "generate", "train", "tokens/s/GPU", "GB trainer", "trainer", "servers"):
        table.add_column(name, justify="left" if name in ("trainer", "servers") else "right")
    for each in plans[:SHOWN]:
        division = each.division
        experts = f" ep {division.ep}" if division.ep > 1 else ""
        context = f" cp {each.cp}" if each.cp > 1 else ""
        table.add_row(
            f"{each.time.total:.0f}",
            f"{each.time.generate:.0f}",
            f"{each.time.score + each.time.update:.0f}",
            f"{each.tokens_per_s_per_gpu:.0f}",
            f"{max(memory.total for memory in each.trainer) / 1e9:.1f}",
            f"tp {division.tp}{context} pp {division.pp} dp {each.dp}{experts}"
            + (" recompute" if each.recompute else ""),
            f"{each.server_gpus // each.server_tp} x {each.server_tp}",
        )
    console.print(table, highlight=False)
    if (alike := len(indistinct(plans, assume))) > 1:
        console.print(
            f"the first {alike} differ by less than the {assume.error:.0%} that this model of time can tell apart; "
            "they stand in the order of their pipeline stages",
            highlight=False,
        )
    best = plans[0]
    if best.because:
        console.print(f"cp: {best.cp} ranks divide the rows of the first, since {best.because}", highlight=False)
    console.print("the first of them: " + " ".join(best.overrides), highlight=False)


def _print_column(
    console: Console, title: str, values: Mapping[str, float], unit: float, *, total: float | None = None
) -> None:
    """Print a title, the values that are not zero in the unit, and their total; None: the sum."""
    console.print(f"{title}:", highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in values.items():
        if value:
            table.add_row(f"  {name}", f"{value / unit:.1f}")
    table.add_row("  in all", f"{(sum(values.values()) if total is None else total) / unit:.1f}", style="bold")
    console.print(table)


def as_json(
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
        "because": each.because,
        "trainer_bytes": [memory.parts for memory in each.trainer],
        "server_bytes": asdict(each.server),
        "host_bytes": each.host.parts,
        "seconds": {**asdict(each.time), "total": each.time.total},
        "trainer_idle": each.time.trainer_idle,
        "server_idle": each.time.server_idle,
        "mean_age": each.time.mean_age,
        "tokens_per_s_per_gpu": each.tokens_per_s_per_gpu,
    }
