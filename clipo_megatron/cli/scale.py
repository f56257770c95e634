"""`clipo scale`: submits a run on several numbers of nodes, waits, and compares what was measured."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.cli.numbers import hours, whole, whole_numbers
from clipo_megatron.cli.submit import add_resources, hardware_of, resources_of
from clipo_megatron.slurm.ladder import STRONG, WEAK, Rung, continued, folder_of, ladder, read, write
from clipo_megatron.slurm.resources import SlurmError

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
  clipo scale run.yaml --nodes 1,2,4,8 --gpus-per-node 8 --dry-run      the ladder, checked against the plan
  clipo scale run.yaml --nodes 1,2,4,8 --gpus-per-node 8 --wait 0       submit, and come back later:
  clipo scale run.yaml --collect                                        what is measured so far
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, the one that training gets")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
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
    parser.add_argument("--dry-run", action="store_true", help="show and check the ladder, and submit nothing")
    add_resources(parser)


def run(options: argparse.Namespace) -> int:
    """Submit what is missing, wait, and compare.

    Returns:
        0 if every run of the ladder is measured, else 1.
    """
    from clipo_megatron.config.load import load
    from clipo_megatron.runtime.run_dir import CHECKPOINTS

    config = load(options.config, options.overrides)
    folder = folder_of(config)
    if not 0 <= options.skip < options.steps:
        raise SlurmError(f"--skip {options.skip} of --steps {options.steps} leaves nothing to measure. Lower it.")
    if options.collect:
        rungs = read(folder)
        if not rungs:
            raise SlurmError(f"{folder} has no ladder. Give --nodes to measure one, or correct train.output.")
    else:
        rungs = continued(_wanted(options, config), read(folder))
        _check(options, rungs)
        if options.dry_run:
            return 0
        rungs = _submit(options, rungs, folder)
        for rung in _wait(rungs, time.monotonic() + 3600 * options.wait):
            shutil.rmtree(Path(rung.output) / CHECKPOINTS, ignore_errors=True)
    return _compare(rungs, folder, options.skip)


def _wanted(options: argparse.Namespace, config: RunConfig) -> list[Rung]:
    if options.nodes is None:
        raise SlurmError("give --nodes, such as --nodes 1,2,4,8, or --collect for a ladder that was submitted")
    kinds = (WEAK, STRONG) if options.kind == "both" else (options.kind,)
    rungs = ladder(
        config,
        options.nodes,
        options.server_nodes,
        lambda nodes, servers: resources_of(options, nodes, servers),
        kinds=kinds,
        steps=options.steps,
    )
    return [replace(rung, overrides=(*options.overrides, *rung.overrides)) for rung in rungs]


def _check(options: argparse.Namespace, rungs: Sequence[Rung]) -> None:
    """Check all jobs before the first is queued, and print them."""
    from clipo_megatron.slurm.submit import submit

    for rung in rungs:
        resources = resources_of(options, rung.nodes, rung.server_nodes)
        job = submit(
            options.config,
            rung.overrides,
            resources,
            hardware=hardware_of(options),
            anyway=options.anyway,
            dry_run=True,
        )
        where = f"{rung.nodes} nodes" + (f" and {rung.server_nodes} of servers" if rung.server_nodes else "")
        print(
            f"{rung.name:<10} {rung.ranks} ranks on {where}, {rung.prompts} prompts per step; {'; '.join(job.remarks)}"
        )


def _submit(options: argparse.Namespace, rungs: list[Rung], folder: Path) -> list[Rung]:
    """Submit the rungs that are neither measured nor in the queue. Returns all of them, with their jobs."""
    from clipo_megatron.slurm.measure import done_steps
    from clipo_megatron.slurm.submit import OVER, job_state, submit

    for index, rung in enumerate(rungs):
        if done_steps(rung) >= rung.steps or (rung.job and job_state(rung.job) not in OVER):
            continue
        resources = resources_of(options, rung.nodes, rung.server_nodes)
        earlier = [each.job for each in rungs[:index] if each.job]
        if options.one_by_one and earlier:
            resources = replace(resources, options=(*resources.options, f"--dependency=afterany:{':'.join(earlier)}"))
        job = submit(options.config, rung.overrides, resources, hardware=hardware_of(options), anyway=options.anyway)
        rungs[index] = replace(rung, job=job.id)
        write(folder, rungs)  # at once, so that the number of the job is never lost
        print(f"{rung.name:<10} job {job.id}, {job.folder / 'job.log'}")
    write(folder, rungs)
    return rungs


def _wait(rungs: Sequence[Rung], deadline: float) -> list[Rung]:
    """Wait until the queue has none of the jobs, or for the deadline. Returns the rungs whose jobs did all steps."""
    from clipo_megatron.slurm.measure import done_steps
    from clipo_megatron.slurm.submit import OVER, job_state

    told: dict[str, str] = {}
    waiting, pause = [rung for rung in rungs if rung.job], 1.0
    while waiting:
        for rung in waiting:
            state = job_state(rung.job)
            if told.get(rung.name) != state:
                told[rung.name] = state
                word = state or "no longer known to Slurm"
                print(f"{rung.name:<10} job {rung.job} {word}, {done_steps(rung)} of {rung.steps} steps", flush=True)
        waiting = [rung for rung in waiting if told[rung.name] not in OVER]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(f"{rung.name} (job {rung.job})" for rung in waiting)
            print(f"--wait is over: {names} not done. They stay in the queue; --collect shows what is measured.")
            break
        if waiting:
            time.sleep(pause)
            pause = min(1.3 * pause, _LONGEST_POLL_S)
    return [rung for rung in rungs if told.get(rung.name) in OVER and done_steps(rung) >= rung.steps]


def _compare(rungs: Sequence[Rung], folder: Path, skip: int) -> int:
    from clipo_megatron.slurm import scaling_table as report
    from clipo_megatron.slurm.measure import done_steps, measure

    found = {rung.name: measure(rung, skip=skip) for rung in rungs}
    runs = [each for each in found.values() if each is not None]
    if runs:
        print(f"\n{report.text(runs)}\n")
        for file in report.write(runs, folder):
            print(f"  {file}")
        if not (folder / report.PICTURE).exists():
            print("  no picture: matplotlib is not installed (pip install matplotlib; then --collect)")
    for rung in rungs:
        if found[rung.name] is None:
            where = f", see {rung.output}/jobs" if rung.job else ""
            print(f"{rung.name}: not measured, {done_steps(rung)} of {rung.steps} steps are done{where}")
    return 0 if len(runs) == len(rungs) else 1
