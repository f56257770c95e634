"""`clipo submit`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipo_megatron.slurm.resources import JobKind, Resources

DESCRIPTION = """\
Submit CONFIG to Slurm as a job that comes back by itself: some minutes before its walltime, or when it is preempted,
the ranks save and the job queues again; ranks that die are started again from the newest checkpoint.

The configuration is checked for so many ranks, and against the plan's memory of the GPUs, before anything is queued.
The job's folder, train.output/jobs/N, has the script, the resolved configuration, the commit, the environment, and the
logs by rank. With a server engine the job runs `clipo serve` too: on --server-nodes, or beside the ranks.
"""
EXAMPLES = """\
examples:
  clipo submit run.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
  clipo submit run.yaml --nodes 4 --server-nodes 2 --gpus-per-node 8 --partition gpu --account me rollout.engine=sglang
  clipo submit run.yaml --nodes 2 --gpus-per-node 8 --container image.sqsh --mount /data:/data
  clipo submit run.yaml --nodes 2 --gpus-per-node 8 --setup 'module load gcc' --sbatch=--qos=high --dry-run
  clipo submit run.yaml --nodes 1 --gpus-per-node 8 --job eval
  clipo submit run.yaml --nodes 1 --cpus-per-rank 8 --job to-megatron --target checkpoints/start
  clipo submit run.yaml --nodes 1 --job to-hf --target release

A job that runs: scancel --batch --signal=USR1 JOB saves and requeues it; scancel --signal=INT JOB saves and ends it for
good; scontrol requeue JOB requeues it at once; scancel JOB ends it. Then the same `clipo submit` goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, the one that training gets")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
    parser.add_argument("--nodes", metavar="N", type=int, required=True, help="nodes that train")
    parser.add_argument("--server-nodes", metavar="N", type=int, default=0, help="nodes that only generate")
    add_resources(parser)
    parser.add_argument("--job", choices=[kind.value for kind in JobKind], default="train", help="default train")
    parser.add_argument("--target", metavar="FOLDER", type=Path, help="of a conversion")
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, and submit nothing")


def add_resources(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `resources_of`, and --hardware and --anyway."""
    default = Resources(nodes=1)
    parser.add_argument("--gpus-per-node", metavar="N", type=int, default=0, help="default 0: a run on CPUs")
    parser.add_argument("--ranks-per-node", metavar="N", type=int, help="default: one a GPU, or one a node")
    parser.add_argument("--cpus-per-rank", metavar="N", type=int, default=1, help="default 1")
    parser.add_argument("--time", default="", help="walltime of one attempt, such as 24:00:00")
    parser.add_argument("--partition", default="", help="default: Slurm's")
    parser.add_argument("--account", default="", help="default: Slurm's")
    parser.add_argument("--sbatch", metavar="=OPTION", action="append", default=[], help="any other option of sbatch")
    parser.add_argument("--setup", metavar="SHELL", default="", help="shell lines before everything else")
    parser.add_argument("--python", default="", help="interpreter on the nodes; default: this one")
    parser.add_argument("--container", metavar="IMAGE", default="", help="image for pyxis, a file or docker://NAME")
    parser.add_argument("--mount", metavar="HOST:INSIDE", action="append", default=[], help="of the container")
    parser.add_argument(
        "--stop-before", metavar="SECONDS", type=int, default=default.stop_before_s,
        help=f"save so long before the walltime, longer than a step takes; default {default.stop_before_s}",
    )  # fmt: skip
    parser.add_argument("--requeues", metavar="N", type=int, default=default.requeues, help="at most; default 100")
    parser.add_argument(
        "--restarts", metavar="N", type=int, default=default.restarts,
        help=f"failures in a row without a new checkpoint that end the job; default {default.restarts}",
    )  # fmt: skip
    parser.add_argument(
        "--ranks-deadline", metavar="SECONDS", type=int, default=default.ranks_deadline_s,
        help=f"for the other ranks to end once one has; default {default.ranks_deadline_s}",
    )  # fmt: skip
    parser.add_argument("--hardware", default="h100", help="GPUs that the plan reckons with; default h100")
    parser.add_argument("--anyway", action="store_true", help="submit also what the plan says does not fit")


def resources_of(options: argparse.Namespace, nodes: int, server_nodes: int) -> Resources:
    """What a job on so many nodes asks for, as the command line says."""
    return Resources(
        nodes=nodes,
        server_nodes=server_nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node,
        cpus_per_rank=options.cpus_per_rank,
        time=options.time,
        partition=options.partition,
        account=options.account,
        options=tuple(options.sbatch),
        setup=options.setup,
        python=options.python,
        container=options.container,
        mounts=tuple(options.mount),
        stop_before_s=options.stop_before,
        requeues=options.requeues,
        restarts=options.restarts,
        ranks_deadline_s=options.ranks_deadline,
    )


def run(options: argparse.Namespace) -> int:
    """Submit, and say where everything is."""
    from clipo_megatron.slurm.submit import submit

    job = submit(
        options.config,
        options.overrides,
        resources_of(options, options.nodes, options.server_nodes),
        kind=JobKind(options.job),
        target=options.target,
        hardware=options.hardware,
        anyway=options.anyway,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        print(job.script, end="")
    where = f"{job.ranks} ranks on {options.nodes} nodes"
    where += f", and {options.server_nodes} nodes of servers" if options.server_nodes else ""
    remarks = "".join(f"\n#   {remark}" if options.dry_run else f"\n  {remark}" for remark in job.remarks)
    if options.dry_run:
        print(f"# {where}; nothing was submitted{remarks}")
        return 0
    print(f"job {job.id}: {where}{remarks}\n  folder    {job.folder}\n  log       {job.folder / 'job.log'}")
    print(f"  ranks     {job.folder / 'logs'}")
    return 0
