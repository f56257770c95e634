"""The speed of a run of a scaling study, read from its metrics, and its scaling efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from clipo_megatron.runtime.run_dir import METRICS
from clipo_megatron.slurm.scaling_points import ScalingPoint
from clipo_megatron.telemetry.metric_names import PHASES, STEP_TIME, TOKENS_PER_S, phase_time
from clipo_megatron.telemetry.sinks import read_metrics


@dataclass(frozen=True, slots=True)
class Measured:
    """The speed of one run, over the steps that count."""

    point: ScalingPoint
    steps: int  # number of steps that count
    seconds: float  # median time of a step
    fastest: float  # shortest time of a step, in seconds
    slowest: float  # longest time of a step, in seconds
    tokens_per_s: float  # trained prompt and response tokens per second per GPU, or a rank on CPUs
    shares: dict[str, float]  # share of the time by phase; "other" is the time that no phase covers


def done_steps(point: ScalingPoint) -> int:
    """Number of steps that a run has logged."""
    return len(read_metrics(Path(point.output) / METRICS))


def measure(point: ScalingPoint, *, skip: int) -> Measured | None:
    """The speed of a run that has done all its steps; None for other runs.

    Args:
        point: the run, whose output is read.
        skip: number of first steps that do not count: they fill caches, compile kernels and allocate memory.
    """
    lines = read_metrics(Path(point.output) / METRICS)
    counted = [line for line in lines[skip:] if line.get(STEP_TIME) and line.get(TOKENS_PER_S) is not None]
    if len(lines) < point.steps or not counted:
        return None
    spent = [line[STEP_TIME] for line in counted]
    total = sum(spent)
    tokens = sum(line[TOKENS_PER_S] * line[STEP_TIME] for line in counted) * point.ranks
    shares = {phase: sum(line.get(phase_time(phase)) or 0.0 for line in counted) / total for phase in PHASES}
    return Measured(
        point=point,
        steps=len(counted),
        seconds=median(spent),
        fastest=min(spent),
        slowest=max(spent),
        tokens_per_s=tokens / total / point.units,
        shares={**shares, "other": max(0.0, 1.0 - sum(shares.values()))},
    )


def efficiency(runs: Sequence[Measured], kind: str) -> dict[str, float]:
    """Each run's tokens per second per GPU over those of the smallest run, by name; {} if that was not measured.

    This holds for weak and strong scaling: n times the GPUs should train n times the tokens per second, with more
    tokens per step or with shorter steps. Tokens are compared, not seconds, as responses differ in length between runs.
    """
    measured = sorted((run for run in runs if kind in run.point.kinds), key=lambda run: run.point.nodes)
    if not measured or not measured[0].point.is_first:
        return {}
    base = measured[0].tokens_per_s
    return {run.point.name: run.tokens_per_s / base for run in measured}
