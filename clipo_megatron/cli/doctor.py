"""`clipo doctor`: what this machine has, and what a run would use of it."""

from __future__ import annotations

import argparse
import os
import platform as host
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from clipo_megatron.checks.grading import sandbox_here
from clipo_megatron.config.packages import other_version
from clipo_megatron.runtime.launch import cores
from clipo_megatron.runtime.launcher_env import from_environment
from clipo_megatron.serving.environment import RECIPES, Recipe
from clipo_megatron.serving.gpus import gpus

DESCRIPTION = "What this machine has, and what a run would use of it."
EXAMPLES = ""
GIB = 2**30
WIDE = 160  # columns of a file or a pipe, as for a report of a fault
NEEDED = ("torch", "megatron-core", "transformers", "omegaconf", "math-verify", "reasoning-gym")
OPTIONAL = {
    "transformer-engine": "faster layers on GPUs",
    "apex": "fused AdamW on GPUs, where transformer-engine is absent",
    "flash-attn-3": "faster attention on GPUs of compute capability 9",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. `remark` says what it means for a run, if that is unusual."""

    section: str
    what: str
    value: str
    remark: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: this command has no arguments."""


def run(_options: argparse.Namespace) -> int:
    examine()
    return 0


def examine(console: Console | None = None) -> None:
    """Print all findings as a table, to the terminal by default."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = ""
    for finding in findings():
        if finding.section != section:
            if section:
                table.add_row()
            section = finding.section
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(
            f"  {finding.what}", finding.value + (f" [dim]({finding.remark})[/dim]" if finding.remark else "")
        )
    console = console or Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def findings() -> list[Finding]:
    """All findings, in the order of the table."""
    return [*_machine(), *_packages(), *_servers(), *_launchers(), *_would_be_used()]


def _machine() -> list[Finding]:
    def found(what: str, value: str, remark: str = "") -> Finding:
        return Finding("machine", what, value, remark)

    from clipo_megatron.runtime.platform import platform

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    found_gpus, reason = gpus()
    unused = "but this torch cannot use them; install its GPU build" if found_gpus and not platform().has_gpu else ""
    return [
        found("Python", host.python_version(), sys.executable),
        found("system", f"{host.system()} {host.release()}, {host.machine()}"),
        found("cores", str(cores()), f"of {os.cpu_count()}" if cores() != os.cpu_count() else ""),
        found("memory", f"{memory.total / GIB:.0f} GiB", f"{memory.available / GIB:.0f} GiB available"),
        found("disk", f"{disk.free / GIB:.0f} GiB free", f"in {Path.cwd()}"),
        *([found("GPU", gpu, unused) for gpu in found_gpus] or [found("GPU", "none", reason)]),
        found("sandbox of graders", *sandbox_here()),
    ]


def _packages() -> list[Finding]:
    needed = [
        Finding(
            "packages", name, version(name) or "missing: pip install 'clipo-megatron[train]', or run `make install`"
        )
        for name in NEEDED
    ]
    optional = [
        Finding(
            "optional packages", name, version(name) or version(f"{name}-cpu") or "not installed", _fit(name) or use
        )
        for name, use in OPTIONAL.items()
    ]
    return needed + optional


def _fit(distribution: str) -> str | None:
    """Why Megatron may not work with the installed version of an optional package."""
    problem = other_version(distribution, wanted_by="megatron-core")
    return ": ".join(problem) if problem else None


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _servers() -> list[Finding]:
    """Whether `clipo serve` can run each engine on this machine, and with which interpreter."""
    on_cpu = not gpus()[0]
    return [Finding("servers", recipe.name, *_engine(recipe, on_cpu)) for recipe in RECIPES.values()]


def _engine(recipe: Recipe, on_cpu: bool) -> tuple[str, str]:
    here = version(recipe.name) or version(f"{recipe.name}-cpu")
    if here:
        return here, f"in {sys.executable}"
    if not on_cpu:
        return "not installed here", "install it in an environment of its own, and name that in serve.python"
    if recipe.is_ready:
        return "ready", f"in {recipe.folder}"
    size = f"{recipe.minutes:.0f} minutes, {recipe.gigabytes:.1f} GB"
    return "not set up", f"`clipo serve` or `make engines` does it once: about {size}"


def _launchers() -> list[Finding]:
    place = from_environment()
    present = [name for name in ("sinfo", "sbatch", "srun") if shutil.which(name)]
    job = os.environ.get("SLURM_JOB_ID")
    return [
        Finding("launchers", "Slurm", ", ".join(present) or "not found", f"in job {job}" if job else "not in a job"),
        Finding(
            "launchers",
            "this process",
            f"rank {place.rank} of {place.world}" if place else "no rank",
            "" if place else "`clipo train` starts its own ranks here",
        ),
    ]


def _would_be_used() -> list[Finding]:
    from clipo_megatron.runtime.platform import platform

    here = platform()
    engine = here.has_gpu and _importable("transformer_engine")
    choices = {
        "device": here.name,
        "backend": here.backend,
        "attention": _attention(here.has_gpu),
        "layers": "transformer-engine" if engine else "megatron-core's own",
        "optimizer": _optimizer(),
        "precision": "bf16 or fp32, with fp32 master weights",
        "rollouts": "transformers, in the training processes; or servers of `clipo serve`",
    }
    return [Finding("a run would use", what, choice) for what, choice in choices.items()]


def _attention(on_gpu: bool) -> str:
    """The kernels of attention, as `policy/model/attention_kernels.py` chooses them."""
    if not on_gpu:
        return "torch's flash kernel for CPUs"
    return (
        "flash kernels, version 3 where the GPU has it"
        if _importable("flash_attn_interface")
        else "torch's flash kernels"
    )


def _optimizer() -> str:
    """The optimizer's implementation: Megatron takes the first of these packages that it can import."""
    if _importable("transformer_engine"):
        return "FusedAdam of transformer-engine"
    return "FusedAdam of apex" if _importable("apex") else "AdamW of torch"


def _importable(package: str) -> bool:
    return util.find_spec(package) is not None
