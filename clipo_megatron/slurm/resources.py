"""What a job asks of Slurm, and how often it may be requeued and restarted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

# Options of sbatch that say how much of a node a job gets; where a user gives one, it is not chosen here.
_SHARING = ("--exclusive", "--oversubscribe", "-s", "--cpus-per-task", "-c", "--cpus-per-gpu")
# Options of sbatch whose values the job's script relies on, and what to give in their place.
_DECIDED = {
    **dict.fromkeys(("--nodes", "-N"), "Give --nodes"),
    **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node", "--tasks-per-node"), "Give --ranks-per-node"),
    **dict.fromkeys(("--array", "-a"), "A run is one job: submit each of several by itself"),
    "--signal": "Give --stop-before",
    "--no-requeue": "Give --requeues 0",
    "--wrap": "Give --setup for commands that run first",
}
_MEMORY = ("--mem", "--mem-per-cpu", "--mem-per-gpu")


class SlurmError(RuntimeError):
    """A job or a scaling study cannot be submitted or read; the message says why, and what to change."""


class JobKind(str, Enum):
    """What a job does; the value is its name on the command line."""

    train = "train"
    evaluation = "eval"
    to_megatron = "to-megatron"
    to_hf = "to-hf"

    @property
    def converts(self) -> bool:
        """Tell whether the job is a conversion: one process on one node."""
        return self in (JobKind.to_megatron, JobKind.to_hf)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one job asks for. Fields that end in _s are seconds."""

    nodes: int  # nodes that train
    server_nodes: int = 0  # further nodes that only generate; 0: servers share the nodes that train
    gpus_per_node: int = 0  # 0: a run on CPUs
    ranks_per_node: int | None = None  # None: one rank per GPU; without GPUs one per node
    gpu_type: str = ""  # of --gpus-per-node, such as h100; "": any
    cpus_per_rank: int | None = None  # None: whole nodes, whose cores are divided by their ranks
    memory: str = ""  # of each node in Slurm's spelling, such as 200G; "": all that the node has
    time: str = ""  # walltime of one attempt in Slurm's spelling, such as 24:00:00; "": the partition's default
    partition: str = ""  # "": Slurm's default
    server_partition: str = ""  # of the nodes that only generate; "": the same
    account: str = ""  # "": Slurm's default
    options: tuple[str, ...] = ()  # further options of sbatch, such as --qos=high
    server_options: tuple[str, ...] = ()  # further ones for the nodes that only generate
    setup: str = ""  # shell lines that run first, such as: module load gcc
    python: str = ""  # interpreter on the nodes; "": this one, or the container's python3
    container: str = ""  # image: a file or docker://...; "": no container
    container_runtime: str = ""  # what starts it: pyxis, apptainer or singularity; "": by the image
    mounts: tuple[str, ...] = ()  # HOST:INSIDE, beyond the folders that the configuration needs
    stop_before_s: int = 300  # time before the walltime at which the ranks are asked to end their step and save
    requeues: int = 100  # most requeues of one job
    restarts: int = 3  # most restarts in a row without a new checkpoint between them
    ranks_deadline_s: int = 120  # time for the other ranks to end once one has ended
    nodes_deadline_s: int = 120  # time for all nodes to show that they see the job's files

    @property
    def ranks_a_node(self) -> int:
        """Ranks on each node that trains."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_a_node

    @property
    def whole_nodes(self) -> bool:
        """Tell whether the job gets its nodes with all their cores and for itself."""
        return self.cpus_per_rank is None and not _given(self.options, _SHARING)

    @property
    def memory_options(self) -> list[str]:
        """The option of sbatch that asks for memory: all of each node, unless the user says otherwise."""
        return [] if _given(self.options, _MEMORY) else [f"--mem={self.memory or 0}"]

    @property
    def grace_period_s(self) -> int:
        """Seconds that the ranks have to end their step and save: four fifths of `stop_before_s`."""
        before = max(10, self.stop_before_s)
        return before - before // 5

    @property
    def gpus(self) -> int:
        """GPUs of all nodes, those of servers included."""
        return (self.nodes + self.server_nodes) * self.gpus_per_node

    def check(self) -> None:
        """Raise a SlurmError if a number is out of range or contradicts another."""
        least = {"nodes": 1, "ranks_deadline_s": 5, "nodes_deadline_s": 5}
        least |= {} if self.cpus_per_rank is None else {"cpus_per_rank": 1}
        for name in ("server_nodes", "gpus_per_node", "requeues", "restarts", "stop_before_s"):
            least[name] = 0
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise SlurmError(f"{_flag(name)} {getattr(self, name)}: it must be at least {limit}. Raise it.")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise SlurmError(f"--ranks-per-node {self.ranks_per_node}: it must be at least 1. Raise it.")
        if self.gpus_per_node and self.ranks_a_node > self.gpus_per_node:
            raise SlurmError(
                f"--ranks-per-node {self.ranks_a_node} on --gpus-per-node {self.gpus_per_node}: each rank needs a GPU "
                "of its own. Lower the one or raise the other."
            )
        if self.time and (seconds := walltime_s(self.time)) is not None and seconds <= self.stop_before_s:
            raise SlurmError(
                f"--time {self.time} is {seconds} s, and the ranks are asked to stop {self.stop_before_s} s before: "
                "the job would never do a step. Give it more time, or lower --stop-before."
            )
        for mount in self.mounts:
            if ":/" not in mount or not self.container:
                raise SlurmError(
                    f"--mount {mount}: it takes HOST:INSIDE, with the whole path inside, and a --container. Correct it."
                )
        if (self.server_partition or self.server_options) and not self.server_nodes:
            option = "--server-partition" if self.server_partition else "--server-sbatch"
            raise SlurmError(f"{option} is for the nodes that only generate. Give --server-nodes, or leave it out.")
        for option in (*self.options, *self.server_options):
            if not option.startswith("-") or "\n" in option:
                raise SlurmError(f"--sbatch {option}: it takes an option of sbatch, such as --sbatch=--qos=high")
            if (name := _name_of(option)) in _DECIDED:
                raise SlurmError(f"--sbatch {option}: the job's script relies on another {name}. {_DECIDED[name]}.")


def walltime_s(text: str) -> int | None:
    """Seconds of a time limit in Slurm's spelling; None for no limit.

    Raises:
        SlurmError: `text` is not such a spelling.
    """
    if text.lower() in ("infinite", "unlimited", "0"):
        return None
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", text):
        raise SlurmError(f"--time {text}: it takes minutes, H:MM:SS, D-HH or D-HH:MM:SS. Correct it.")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:  # D-HH[:MM[:SS]] or HH:MM:SS
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:  # MM[:SS]
        hours, minutes, seconds = 0, parts[0], [*parts, 0][1]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def shared_paths(*paths: str | Path | None) -> list[str]:
    """The folders that a container must mount to see `paths`; none of them lies below another."""
    found = {str(path if (path := Path(each)).is_dir() else path.parent) for each in paths if each}
    return sorted(one for one in found if not any(one != other and one.startswith(f"{other}/") for other in found))


def _given(options: tuple[str, ...], names: tuple[str, ...]) -> bool:
    return any(_name_of(option) in names for option in options)


def _name_of(option: str) -> str:
    """The name in an option of sbatch: --nodes of --nodes=4, -N of -N4."""
    return re.split(r"[= ]", option, maxsplit=1)[0] if option.startswith("--") else option[:2]


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")
