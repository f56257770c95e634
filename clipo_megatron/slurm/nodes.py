"""What a cluster's nodes have, as Slurm tells it, and the share of a node that a job with some of its GPUs gets."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace

from clipo_megatron.slurm.resources import Resources, SlurmError

_SINFO_S = 20.0


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The cores, memory and GPUs that every node of a partition has at least."""

    cores: int
    memory_mb: int
    gpus: int


def gpus_of(text: str) -> tuple[int, str]:
    """Read what --gpus-per-node takes, as sbatch does: 8, h100:8 or gpu:h100:8. Returns the number and the type.

    Raises:
        SlurmError: it is none of these.
    """
    found = re.fullmatch(r"(?:gpu:)?(?:([^:,=\s]+):)?(\d+)", text)
    if not found:
        raise SlurmError(
            f"--gpus-per-node {text}: it takes a number, or a type and a number such as h100:8. Correct it."
        )
    return int(found[2]), found[1] or ""


def node_facts(partition: str, gpu_type: str) -> NodeFacts | None:
    """Ask Slurm what the nodes of a partition have, of a type of GPU if one is given; None if it cannot say."""
    command = [
        "sinfo",
        "--noheader",
        "--Node",
        "--format=%c|%m|%G|%P",
        *([f"--partition={partition}"] if partition else []),
    ]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_SINFO_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 3]
    if not partition:  # a job that names no partition runs in the default one, which Slurm marks with a star
        rows = [row for row in rows if row[3].strip().endswith("*")]
    nodes = [
        NodeFacts(int(cores.rstrip("+")), int(memory.rstrip("+")), _gpus_in(gres, gpu_type))
        for cores, memory, gres, _ in rows
        if cores.rstrip("+").isdigit() and memory.rstrip("+").isdigit()
    ]
    if gpu_type or any(node.gpus for node in nodes):
        nodes = [node for node in nodes if node.gpus]
    if not nodes:
        return None
    return NodeFacts(*(min(getattr(node, name) for node in nodes) for name in ("cores", "memory_mb", "gpus")))


def _gpus_in(gres: str, gpu_type: str) -> int:
    """Count the GPUs in Slurm's list of a node's resources, such as "gpu:h100:8(S:0-1),nvme:2"."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", re.sub(r"\([^)]*\)", "", gres))
    return sum(int(count) for kind, count in found if not gpu_type or kind.lower() == gpu_type.lower())


def fitted(resources: Resources, node: NodeFacts | None) -> Resources:
    """Give a job that asks for some of a node's GPUs that share of its cores and memory; others get whole nodes."""
    asked = resources.gpus_per_node
    if node is None or not 0 < asked < node.gpus:
        return resources
    if resources.cpus_per_rank is None:
        cores = max(1, node.cores * asked // node.gpus // resources.ranks_a_node)
        resources = replace(resources, cpus_per_rank=cores)
    if not resources.memory:
        resources = replace(resources, memory=f"{node.memory_mb * asked // node.gpus}M")
    return resources
