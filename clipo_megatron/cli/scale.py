"""`clipo scale`: submits a run on several numbers of nodes, waits, and compares what was measured."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.cli.arguments import add_config
from clipo_megatron.cli.numbers import hours, whole, whole_numbers
from clipo_megatron.cli.submit import add_resources, hardware_of, resources_of
from clipo_megatron.config.errors import counted
from clipo_megatron.slurm.resources import SlurmError
from clipo_megatron.slurm.scaling_points import (
    STRONG,
    WEAK,
    ScalingPoint,
    continued,
    folder_of,
    read,
    scaling_points,
    write,
)

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig

_LONGEST_POLL_S = 30.0
DESCRIPTION = """\
Submit the same run on several numbers of nodes, wait, and compare the tokens per second per GPU.

Weak scaling: a step's prompts grow with the nodes, from data.prompts_per_step on the fewest. Strong scaling: they stay.
layout.dp follows the nodes, TP, PP and EP stay. Runs are short, evaluate nothing, and their checkpoints are removed.
Everything lands in train.output/scale: scale.md, scale.json, and scale.svg where matplotlib is installed. Called again,
it measures only what is missing; Ctrl-C leaves the jobs in the queue.
"""
EXAMPLES = """\
examples:
  clipo scale run.yaml --nodes 1,2,4,8 --gpus-per-node 8 --time 1:00:00
  clipo scale run.yaml --nodes 2,4,8 --server-nodes 1,2,4 --gpus-per-node 8 --kind weak
  clipo scale run.yaml --nodes 1,2,4,8 --gpus-per-node 8 --dry-run      the runs, checked against the plan
  clipo scale run.yaml --nodes 1,2,4,8 --gpus-per-node 8 --wait 0       submit, and come back later:
  clipo scale run.yaml --collect                                        what is measured so far
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--nodes", metavar="N,N", type=whole_numbers, help="numbers of nodes that train, such as 1,2,4,8"
    )
    parser.add_argument(
        "--server-nodes",
        metavar="N,N",
        type=whole_numbers,
        default=(),
        help="as many numbers of nodes that only generate",
    )
    parser.add_argument("--kind", choices=(WEAK, STRONG, "both"), default="both", help="kind of scaling; default both")
    parser.add_argument("--steps", metavar="N", type=whole(), default=6, help="steps of each run; default 6")
    parser.add_argument("--skip", metavar="N", type=whole(0), default=1, help="first steps to leave out; default 1")
    parser.add_argument("--one-by-one", action="store_true", help="no two runs at the same time")
    parser.add_argument("--wait", metavar="HOURS", type=hours, default=24.0, help="wait for the jobs; default 24")
    parser.add_argument("--collect", action="store_true", help="submit nothing; show what is measured")
    parser.add_argument("--dry-run", action="store_true", help="show and check the runs, and submit nothing")
    add_resources(parser)


def run(options: argparse.Namespace) -> int:
    """Submit what is missing, wait, and compare.

    Returns:
        0 if every run of the study is measured, else 1.
    """
    from clipo_megatron.config.load import load
    from clipo_megatron.runtime.run_dir import CHECKPOINTS

    config = load(options.config, options.overrides)
    folder = folder_of(config)
    if not 0 <= options.skip < options.steps:
        raise SlurmError(f"--skip {options.skip} of --steps {options.steps} leaves nothing to measure. Lower it.")
    if options.collect:
        points = read(folder)
        if not points:
            raise SlurmError(f"{folder} has no scaling study. Give --nodes to begin one, or correct train.output.")
    else:
        points = continued(_wanted(options, config), read(folder))
        _check(options, points)
        if options.dry_run:
            return 0
        points = _submit(options, points, folder)
        for point in _wait(points, time.monotonic() + 3600 * options.wait):
            shutil.rmtree(Path(point.output) / CHECKPOINTS, ignore_errors=True)
    return _compare(points, folder, options.skip)


def _wanted(options: argparse.Namespace, config: RunConfig) -> list[ScalingPoint]:
    if options.nodes is None:
        raise SlurmError("give --nodes, such as --nodes 1,2,4,8, or --collect for runs that were submitted")
    kinds = (WEAK, STRONG) if options.kind == "both" else (options.kind,)
    points = scaling_points(
        config,
        options.nodes,
        options.server_nodes,
        lambda nodes, servers: resources_of(options, nodes, servers),
        kinds=kinds,
        steps=options.steps,
    )
    return [replace(point, overrides=(*options.overrides, *point.overrides)) for point in points]


def _check(options: argparse.Namespace, points: Sequence[ScalingPoint]) -> None:
    """Check all jobs before the first is queued, and print them."""
    from clipo_megatron.slurm.submit import submit

    for point in points:
        resources = resources_of(options, point.nodes, point.server_nodes)
        job = submit(
            options.config,
            point.overrides,
            resources,
            hardware=hardware_of(options),
            anyway=options.anyway,
            dry_run=True,
        )
        where = counted(point.nodes, "node") + (f" and {point.server_nodes} of servers" if point.server_nodes else "")
        size = f"{counted(point.ranks, 'rank')} on {where}, {point.prompts} prompts per step"
        print(f"{point.name:<10} {size}; {'; '.join(job.remarks)}")


def _submit(options: argparse.Namespace, points: list[ScalingPoint], folder: Path) -> list[ScalingPoint]:
    """Submit the points that are neither measured nor in the queue. Returns all of them, with their jobs."""
    from clipo_megatron.slurm.measure import done_steps
    from clipo_megatron.slurm.submit import OVER, job_state, submit

    for index, point in enumerate(points):
        if done_steps(point) >= point.steps or (point.job and job_state(point.job) not in OVER):
            continue
        resources = resources_of(options, point.nodes, point.server_nodes)
        earlier = [each.job for each in points[:index] if each.job]
        if options.one_by_one and earlier:
            resources = replace(resources, options=(*resources.options, f"--dependency=afterany:{':'.join(earlier)}"))
        job = submit(options.config, point.overrides, resources, hardware=hardware_of(options), anyway=options.anyway)
        points[index] = replace(point, job=job.id)
        write(folder, points)  # at once, so that the number of the job is never lost
        print(f"{point.name:<10} job {job.id}, {job.folder / 'job.log'}")
    write(folder, points)
    return points


def _wait(points: Sequence[ScalingPoint], deadline: float) -> list[ScalingPoint]:
    """Wait until the queue has none of the jobs, or for the deadline. Returns the points whose jobs did all steps."""
    from clipo_megatron.slurm.measure import done_steps
    from clipo_megatron.slurm.submit import OVER, job_state

    told: dict[str, str] = {}
    waiting, pause = [point for point in points if point.job], 1.0
    while waiting:
        for point in waiting:
            state = job_state(point.job)
            if told.get(point.name) != state:
                told[point.name] = state
                word, steps = state or "no longer known to Slurm", f"{done_steps(point)} of {point.steps} steps"
                print(f"{point.name:<10} job {point.job} {word}, {steps}", flush=True)
        waiting = [point for point in waiting if told[point.name] not in OVER]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(f"{point.name} (job {point.job})" for point in waiting)
            print(f"--wait is over: {names} not done. They stay in the queue; --collect shows what is measured.")
            break
        if waiting:
            time.sleep(pause)
            pause = min(1.3 * pause, _LONGEST_POLL_S)
    return [point for point in points if told.get(point.name) in OVER and done_steps(point) >= point.steps]


def _compare(points: Sequence[ScalingPoint], folder: Path, skip: int) -> int:
    from clipo_megatron.slurm import scaling_table as report
    from clipo_megatron.slurm.measure import done_steps, measure

    found = {point.name: measure(point, skip=skip) for point in points}
    runs = [each for each in found.values() if each is not None]
    if runs:
        print(f"\n{report.text(runs)}\n")
        for file in report.write(runs, folder):
            print(f"  {file}")
        if not (folder / report.PICTURE).exists():
            print("  no picture: matplotlib is not installed (pip install matplotlib; then --collect)")
    for point in points:
        if found[point.name] is None:
            where = f", see {point.output}/jobs" if point.job else ""
            print(f"{point.name}: not measured, {done_steps(point)} of {point.steps} steps are done{where}")
    return 0 if len(runs) == len(points) else 1
