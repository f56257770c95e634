"""The memory of one node's host that its ranks take."""

from __future__ import annotations

from dataclasses import dataclass

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.memory import TrainerMemory

PROCESS_BYTES = 4e9  # of a rank: Python, torch, CUDA's libraries, and the texts and tokens of a step


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes on the node whose ranks take most."""

    snapshots: float  # copies of weights and optimizer that a checkpoint is written from while training goes on
    offloaded: float  # what colocated trainers move there while servers generate
    processes: float

    @property
    def parts(self) -> dict[str, float]:
        """The bytes of each part, by its name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> float:
        """The bytes of all parts together."""
        return sum(self.parts.values())


def host_memory(config: RunConfig, trainer: list[TrainerMemory], ranks: int) -> HostMemory:
    """Compute the memory that the `ranks` ranks of a node take; `trainer` is the memory of each stage's GPUs.

    The node is taken to have ranks of the fullest stage alone, and the ranks to be the replica that writes the weights.
    """

    def most(*parts: str) -> float:
        return ranks * max(sum(getattr(stage, part) for part in parts) for stage in trainer)

    return HostMemory(
        snapshots=most("weights", "optimizer", "critic_state") if config.checkpoint.asynchronous else 0.0,
        offloaded=most("optimizer", "reference", "critic_state") if config.rollout.colocated else 0.0,
        processes=PROCESS_BYTES * ranks,
    )
