"""What a run of the ladder delivered, from its metrics, and what that is against the smallest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from clipo_megatron.runtime.run_dir import METRICS
from clipo_megatron.slurm.ladder import Rung
from clipo_megatron.telemetry.sinks import read_lines

PHASES = ("generate", "exchange", "score", "update", "sync")
RATE, STEP = "speed/tokens_per_s_per_rank", "time/step_s"


@dataclass(frozen=True, slots=True)
class Measured:
    """One run."""

    rung: Rung
    steps: int  # that count
    seconds: float  # of a step, median
    fastest: float  # of a step
    slowest: float
    tokens_per_s: float  # prompt and response tokens that train, a GPU (a rank on CPUs), over all steps that count
    shares: dict[str, float]  # of the steps' time, by phase; "other" is what no phase covers


def done_steps(rung: Rung) -> int:
    """Steps that a run has logged."""
    return len(read_lines(Path(rung.output) / METRICS))


def measure(rung: Rung, *, skip: int) -> Measured | None:
    """Of a run that has done all its steps; None for others.

    Args:
        rung: whose output is read.
        skip: first steps that do not count: caches are filled, kernels compiled and memory taken in them.
    """
    lines = read_lines(Path(rung.output) / METRICS)
    counted = lines[skip:]
    if len(lines) < rung.steps or not counted:
        return None
    spent = [line[STEP] for line in counted]
    total = sum(spent)
    tokens = sum(line[RATE] * line[STEP] for line in counted) * rung.ranks
    shares = {phase: sum(line.get(f"time/{phase}_s") or 0.0 for line in counted) / total for phase in PHASES}
    return Measured(
        rung=rung,
        steps=len(counted),
        seconds=median(spent),
        fastest=min(spent),
        slowest=max(spent),
        tokens_per_s=tokens / total / rung.units,
        shares={**shares, "other": max(0.0, 1.0 - sum(shares.values()))},
    )


def efficiency(runs: Sequence[Measured], kind: str) -> dict[str, float]:
    """Tokens a second a GPU over those of the smallest run, by the name of the run; {} without that one.

    The same for weak and strong scaling: of n times the GPUs, n times the tokens a second are due, be it with longer
    steps' work or in shorter steps. Tokens and not seconds, since responses are not equally long in all runs.
    """
    points = sorted((run for run in runs if kind in run.rung.kinds), key=lambda run: run.rung.nodes)
    if not points or not points[0].rung.is_first:
        return {}
    base = points[0].tokens_per_s
    return {run.rung.name: run.tokens_per_s / base for run in points}
