"""Writes a measured scaling study: a table for people, JSON for programs, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.slurm.measure import Measured, efficiency
from clipo_megatron.slurm.scaling_points import STRONG, WEAK
from clipo_megatron.telemetry.metric_names import ALL_PHASES

FIGURES, TABLE, PICTURE = "scale.json", "scale.md", "scale.svg"
COLOURS = dict(zip(ALL_PHASES, ("#2563eb", "#9ca3af", "#d97706", "#b91c1c", "#059669", "#d1d5db"), strict=True))


def unit_of(runs: Sequence[Measured]) -> str:
    """The unit of tokens_per_s: "GPU", or "rank" on CPUs."""
    return "GPU" if runs and runs[0].point.gpus else "rank"


def rows(runs: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, fewest nodes first."""
    unit = unit_of(runs)
    weak, strong = efficiency(runs, WEAK), efficiency(runs, STRONG)
    headings = ["run", "nodes", f"{unit}s", "prompts", "s/step", "range", f"tokens/s/{unit}", "weak", "strong"]
    headings += ALL_PHASES

    def share(values: dict[str, float], name: str) -> str:
        return f"{values[name]:.0%}" if name in values else ""

    cells = []
    for run in sorted(runs, key=lambda run: (run.point.nodes, run.point.name)):
        nodes = str(run.point.nodes) + (f"+{run.point.server_nodes}" if run.point.server_nodes else "")
        spread = f"{run.fastest:.3g} to {run.slowest:.3g}"
        cells.append(
            [run.point.name, nodes, str(run.point.units), str(run.point.prompts), f"{run.seconds:.3g}", spread]
            + [f"{run.tokens_per_s:.4g}", share(weak, run.point.name), share(strong, run.point.name)]
            + [f"{run.shares[phase]:.0%}" for phase in ALL_PHASES]
        )
    return headings, cells


def text(runs: Sequence[Measured]) -> str:
    """The table for a terminal of 80 columns: speeds, and below them the share of each phase."""
    headings, cells = rows(runs)
    first_phase = headings.index(ALL_PHASES[0])
    figures = _aligned([line[:first_phase] for line in (headings, *cells)])
    shares = _aligned([[line[0], *line[first_phase:]] for line in (headings, *cells)])
    return f"{figures}\n\nof the time:\n{shares}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def write(runs: Sequence[Measured], folder: Path) -> list[Path]:
    """Write JSON and table, and the picture where matplotlib is installed; returns the files written."""
    unit = unit_of(runs)
    figures: dict[str, Any] = {
        "tokens_per_s": f"prompt and response tokens that train, a {unit}",
        "runs": [{**asdict(run), "kinds": list(run.point.kinds)} for run in runs],
        "efficiency": {kind: efficiency(runs, kind) for kind in (WEAK, STRONG)},
    }
    write_durably(folder / FIGURES, json.dumps(figures, indent=1))
    headings, cells = rows(runs)
    lines = [headings, ["---"] * len(headings), *cells]
    write_durably(folder / TABLE, "".join(f"| {' | '.join(line)} |\n" for line in lines))
    written = [folder / FIGURES, folder / TABLE]
    return [*written, folder / PICTURE] if draw(runs, folder / PICTURE) else written


def draw(runs: Sequence[Measured], file: Path) -> bool:
    """Draw tokens per second over GPUs, beside perfect scaling, and the share of each phase.

    Returns:
        False without matplotlib, which need not be installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "clipo"  # the same file for the same figures
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    unit = unit_of(runs)
    base = next((run for run in runs if run.point.is_first), None)
    for kind, marker, colour in ((WEAK, "o", "#2563eb"), (STRONG, "s", "#d97706")):
        points = sorted((run for run in runs if kind in run.point.kinds), key=lambda run: run.point.units)
        if points:
            left.plot(
                [run.point.units for run in points],
                [run.tokens_per_s * run.point.units for run in points],
                marker=marker,
                color=colour,
                label=f"{kind} scaling",
            )
    if base is not None:
        ends = [base.point.units, max(run.point.units for run in runs)]
        left.plot(ends, [base.tokens_per_s * each for each in ends], "--", color="#9ca3af", label="as the smallest")
    left.set(xlabel=f"{unit}s", ylabel="tokens/s", ylim=(0, None), xticks=sorted({run.point.units for run in runs}))
    left.legend(frameon=False)
    ordered = sorted(runs, key=lambda run: (run.point.nodes, run.point.name))
    below = [0.0] * len(ordered)
    for phase in ALL_PHASES:
        heights = [100 * run.shares[phase] for run in ordered]
        right.bar(range(len(ordered)), heights, bottom=below, color=COLOURS[phase], label=phase)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    right.set(ylabel="% of the time", ylim=(0, 100))
    right.set_xticks(range(len(ordered)), [run.point.name for run in ordered], rotation=30, ha="right")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True
