"""Draw a run's learning curve from its metrics.jsonl: accuracy and contrastive loss over steps.

python tools/plot_run.py runs/quickstart docs/quickstart.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from clipo_megatron.evaluation.results import read_evaluations
from clipo_megatron.runtime.run_dir import EVALUATIONS, METRICS
from clipo_megatron.telemetry.sinks import read_lines

BLUE, ORANGE, GREY = "#2563eb", "#d97706", "#6b7280"


def draw(run: Path, out: Path) -> None:
    """Write the picture, in the format of the file's suffix."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "clipo"  # equal runs give equal files
    lines = read_lines(run / METRICS)
    if not lines:
        raise SystemExit(f"{run / METRICS} has no steps")
    steps = [line["step"] + 1 for line in lines]
    figure, axes = plt.subplots(figsize=(7.2, 3.2))
    axes.plot(steps, [100 * line["reward/accuracy"] for line in lines], color=BLUE, label="sampled, training problems")
    evaluations = read_evaluations(run / EVALUATIONS)
    axes.plot(
        [each.step for each in evaluations],
        [100 * each.accuracy for each in evaluations],
        "o",
        color=BLUE,
        markersize=8,
        label="greedy, held-out problems",
    )
    for each in evaluations:
        axes.annotate(f"{each.accuracy:.0%}", (each.step, 100 * each.accuracy), (5, 7), textcoords="offset points")
    axes.set(xlabel="step", ylabel="accuracy, %", ylim=(0, 100), xlim=(0, steps[-1] + 1.5))
    axes.legend(loc="upper left", frameon=False)
    loss = axes.twinx()
    measured = [(line["step"] + 1, line["clipo/loss"]) for line in lines if "clipo/loss" in line]
    loss.plot(*zip(*measured, strict=True), color=ORANGE, linewidth=1, alpha=0.8)
    loss.set_ylabel("contrastive loss", color=ORANGE)
    loss.tick_params(axis="y", colors=ORANGE)
    for spine in ("top",):
        axes.spines[spine].set_visible(False)
        loss.spines[spine].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.2)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="picture to write, .svg or .png")
    options = parser.parse_args()
    draw(options.run, options.out)
