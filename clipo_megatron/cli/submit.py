"""`clipo submit`: submits a configuration to Slurm."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipo_megatron.cli.arguments import add_config
from clipo_megatron.cli.numbers import whole
from clipo_megatron.config.errors import counted
from clipo_megatron.runtime.run_dir import LOGS
from clipo_megatron.slurm.container import RUNTIMES
from clipo_megatron.slurm.nodes import gpus_of
from clipo_megatron.slurm.resources import JobKind, Resources

DESCRIPTION = """\
Submit CONFIG to Slurm as a job that requeues itself: some minutes before its walltime, or when it is preempted, the
ranks save and the job queues again. Ranks that die are started again from the newest checkpoint.

The configuration is checked for this number of ranks, and the planned memory against the GPUs, before anything is
queued. The job's folder, train.output/jobs/N, has the script, the resolved configuration, the commit, the environment,
and the logs by rank. With a server engine the job runs `clipo serve` too: on --server-nodes, or beside the ranks.
"""
EXAMPLES = """\
examples:
  clipo submit run.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
  clipo submit run.yaml --nodes 4 --server-nodes 2 --gpus-per-node 8 --partition gpu --account me rollout.engine=sglang
  clipo submit run.yaml --nodes 4 --gpus-per-node h100:8 --partition train
  clipo submit run.yaml --nodes 2 --gpus-per-node 8 --container image.sqsh --mount /data:/data
  clipo submit run.yaml --nodes 2 --gpus-per-node 8 --setup 'module load gcc' --sbatch=--qos=high --dry-run
  clipo submit run.yaml --nodes 1 --gpus-per-node 8 --job eval
  clipo submit run.yaml --nodes 1 --cpus-per-rank 8 --job to-megatron --target checkpoints/start
  clipo submit run.yaml --nodes 1 --job to-hf --target release

A job that runs: scancel --batch --signal=USR1 JOB saves and requeues it; scancel --signal=INT JOB saves and ends it for
good; scontrol requeue JOB requeues it at once; scancel JOB ends it. Then the same `clipo submit` goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--nodes", metavar="N", type=whole(), required=True, help="nodes that train")
    parser.add_argument("--server-nodes", metavar="N", type=whole(0), default=0, help="nodes that only generate")
    add_resources(parser)
    kinds = [kind.value for kind in JobKind]
    parser.add_argument("--job", choices=kinds, default="train", help="what the job does; default train")
    parser.add_argument("--target", metavar="FOLDER", type=Path, help="folder that a conversion writes")
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, and submit nothing")


def add_resources(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments that `resources_of` reads, and --hardware and --anyway."""
    default = Resources(nodes=1)

    def number(name: str, metavar: str, value: int | None, help: str) -> None:
        told = "" if value is None else f"; default {value}"
        parser.add_argument(name, metavar=metavar, type=whole(0), default=value, help=help + told)

    def text(name: str, metavar: str, help: str) -> None:
        parser.add_argument(name, metavar=metavar, default="", help=help)

    def repeated(name: str, metavar: str, help: str) -> None:
        parser.add_argument(name, metavar=metavar, action="append", default=[], help=f"{help}; may be repeated")

    parser.add_argument(
        "--gpus-per-node", metavar="[TYPE:]N", default="0", help="GPUs of each node, such as 8 or h100:8; 0: on CPUs"
    )
    number("--ranks-per-node", "N", None, "ranks on each node; default: one for each GPU, or one without GPUs")
    number("--cpus-per-rank", "N", None, "CPU cores of each rank; default: whole nodes, divided by their ranks")
    text("--mem", "SIZE", "memory of each node, such as 200G; default: all of it")
    text("--time", "TIME", "walltime of one attempt, such as 24:00:00")
    text("--partition", "NAME", "Slurm partition; default: Slurm's own")
    text("--server-partition", "NAME", "partition of the nodes that only generate; default: the same")
    text("--account", "NAME", "Slurm account; default: Slurm's own")
    repeated("--sbatch", "=OPTION", "another option of sbatch")
    repeated("--server-sbatch", "=OPTION", "another option for the nodes that only generate")
    text("--setup", "SHELL", "shell commands that each node runs first")
    text("--python", "FILE", "interpreter on the nodes; default: this one")
    text("--container", "IMAGE", "image that every step runs in, a file or docker://NAME")
    parser.add_argument(
        "--container-runtime",
        choices=RUNTIMES,
        default="",
        help="what starts it; default: apptainer for *.sif, else pyxis",
    )
    repeated("--mount", "HOST:INSIDE", "folder of the node, and where the container has it")
    number(
        "--stop-before",
        "SECONDS",
        default.stop_before_s,
        "seconds before the walltime to save at; more than a step takes",
    )
    number("--requeues", "N", default.requeues, "most times that the job queues again")
    number("--restarts", "N", default.restarts, "failures in a row without a new checkpoint that end the job")
    number("--ranks-deadline", "SECONDS", default.ranks_deadline_s, "for the other ranks to end once one has")
    parser.add_argument(
        "--hardware", metavar="GPU", default="", help="GPUs that the plan assumes; default: the TYPE, or h100"
    )
    parser.add_argument("--anyway", action="store_true", help="submit even what does not fit according to the plan")


def resources_of(options: argparse.Namespace, nodes: int, server_nodes: int) -> Resources:
    """The resources of a job on this number of nodes, with everything else from the command line."""
    gpus, gpu_type = gpus_of(options.gpus_per_node)
    return Resources(
        nodes=nodes,
        server_nodes=server_nodes,
        gpus_per_node=gpus,
        gpu_type=gpu_type,
        ranks_per_node=options.ranks_per_node,
        cpus_per_rank=options.cpus_per_rank,
        memory=options.mem,
        time=options.time,
        partition=options.partition,
        server_partition=options.server_partition,
        account=options.account,
        options=tuple(options.sbatch),
        server_options=tuple(options.server_sbatch),
        setup=options.setup,
        python=options.python,
        container=options.container,
        container_runtime=options.container_runtime,
        mounts=tuple(options.mount),
        stop_before_s=options.stop_before,
        requeues=options.requeues,
        restarts=options.restarts,
        ranks_deadline_s=options.ranks_deadline,
    )


def hardware_of(options: argparse.Namespace) -> str:
    """The GPUs that the plan assumes: those named, else of the type that is asked of Slurm if the plan knows it."""
    from clipo_megatron.planning.hardware import HARDWARE

    _, gpu_type = gpus_of(options.gpus_per_node)
    known = next((name for name in HARDWARE if name in gpu_type.lower()), "h100")
    return options.hardware or known


def run(options: argparse.Namespace) -> int:
    """Submit the job and print where its files are; with --dry-run print its script instead."""
    from clipo_megatron.slurm.submit import submit

    job = submit(
        options.config,
        options.overrides,
        resources_of(options, options.nodes, options.server_nodes),
        kind=JobKind(options.job),
        target=options.target,
        hardware=hardware_of(options),
        anyway=options.anyway,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        print(job.script, end="")
    where = f"{counted(job.ranks, 'rank')} on {counted(options.nodes, 'node')}"
    where += f", and {counted(options.server_nodes, 'node')} of servers" if options.server_nodes else ""
    remarks = "".join(f"\n#   {remark}" if options.dry_run else f"\n  {remark}" for remark in job.remarks)
    if options.dry_run:
        print(f"# {where}; nothing was submitted{remarks}")
        return 0
    print(f"job {job.id}: {where}{remarks}\n  folder    {job.folder}\n  log       {job.folder / 'job.log'}")
    print(f"  ranks     {job.folder / LOGS}")
    return 0
