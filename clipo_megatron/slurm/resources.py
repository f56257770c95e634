"""What a job asks Slurm for, and how often it may come back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from clipo_megatron.slurm.errors import SubmissionError


class JobKind(str, Enum):
    """What a job does; the value names its work on the command line."""

    train = "train"
    evaluation = "eval"
    to_megatron = "to-megatron"
    to_hf = "to-hf"

    @property
    def converts(self) -> bool:
        """Whether it needs ranks but no layout of them."""
        return self in (JobKind.to_megatron, JobKind.to_hf)


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one job. Durations are in seconds, but for `time`."""

    nodes: int  # that train
    server_nodes: int = 0  # that generate, beside those; 0: the same nodes do
    gpus_per_node: int = 0  # 0: CPUs
    ranks_per_node: int | None = None  # None: one a GPU; without GPUs one a node
    cpus_per_rank: int = 1
    time: str = ""  # Slurm's spelling, such as 24:00:00; "": the partition's default
    partition: str = ""  # "": Slurm's default; account likewise
    account: str = ""
    options: tuple[str, ...] = ()  # any others of sbatch, such as --qos=high
    setup: str = ""  # lines of shell before everything else, such as: module load gcc
    python: str = ""  # interpreter on the nodes; "": this one, or the container's
    container: str = ""  # image, for pyxis: a file or docker://...; "": none
    mounts: tuple[str, ...] = ()  # of the container, HOST:INSIDE, beside those that the configuration needs
    stop_before_s: int = 300  # the walltime: then the ranks are asked to end their step and save
    requeues: int = 100  # of the job in all
    restarts: int = 3  # failures in a row, without a new checkpoint between them, that are answered by a restart
    ranks_deadline_s: int = 120  # for the other ranks to end once one has
    nodes_deadline_s: int = 120  # for all nodes to show that they see the job's files

    @property
    def ranks_a_node(self) -> int:
        """Of the nodes that train."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.ranks_a_node

    @property
    def ranks_stop_s(self) -> int:
        """Of the time before the walltime, what the ranks have to end their step and save."""
        before = max(10, self.stop_before_s)
        return before - before // 5

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return (self.nodes + self.server_nodes) * self.gpus_per_node

    def check(self) -> None:
        """Hold the numbers against each other.

        Raises:
            SubmissionError: one makes no sense.
        """
        least = {"nodes": 1, "cpus_per_rank": 1, "ranks_deadline_s": 5, "nodes_deadline_s": 5}
        for name in ("server_nodes", "gpus_per_node", "requeues", "restarts", "stop_before_s"):
            least[name] = 0
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise SubmissionError(f"{_flag(name)} {getattr(self, name)}: it must be at least {limit}. Raise it.")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise SubmissionError(f"--ranks-per-node {self.ranks_per_node}: it must be at least 1. Raise it.")
        if self.gpus_per_node and self.ranks_a_node > self.gpus_per_node:
            raise SubmissionError(
                f"--ranks-per-node {self.ranks_a_node} on --gpus-per-node {self.gpus_per_node}: each rank needs a GPU "
                "of its own. Lower the one or raise the other."
            )
        if self.time and (seconds := walltime_s(self.time)) is not None and seconds <= self.stop_before_s:
            raise SubmissionError(
                f"--time {self.time} is {seconds} s, and the ranks are asked to stop {self.stop_before_s} s before: "
                "the job would never do a step. Give it more time, or lower --stop-before."
            )
        for mount in self.mounts:
            if ":" not in mount or not self.container:
                raise SubmissionError(f"--mount {mount}: it takes HOST:INSIDE, and a --container. Correct it.")
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise SubmissionError(f"--sbatch {option}: it takes an option of sbatch, such as --sbatch=--qos=high")


def walltime_s(text: str) -> int | None:
    """Seconds of a time limit as Slurm spells it; None for no limit.

    Raises:
        SubmissionError: it is spelt otherwise.
    """
    if text.lower() in ("infinite", "unlimited", "0"):
        return None
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", text):
        raise SubmissionError(f"--time {text}: it takes minutes, H:MM:SS, D-HH or D-HH:MM:SS. Correct it.")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:  # D-HH[:MM[:SS]] or HH:MM:SS
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:  # MM[:SS]
        hours, minutes, seconds = 0, parts[0], [*parts, 0][1]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def shared_paths(*paths: str | Path | None) -> list[str]:
    """The folders that contain these, none below another: what a container has to mount."""
    found = {str(path if (path := Path(each)).is_dir() else path.parent) for each in paths if each}
    return sorted(one for one in found if not any(one != other and one.startswith(f"{other}/") for other in found))


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")
