"""Where this rank stands in TP x PP x DP, and the process groups it talks through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.device import platform


@dataclass(frozen=True)
class Layout:
    """One rank's coordinates. Megatron's order of ranks: TP changes fastest, then DP, then PP."""

    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    rank: int
    sequence_parallel: bool
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup  # the tp * pp ranks that hold one copy of the model

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm, the LM head and the contrastive head."""
        return self.pp_rank == self.pp - 1

    @property
    def is_head(self) -> bool:
        """Leads its model replica: the rank that asks servers for rollouts and receives what the replica trains."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def replica_rank(self) -> int:
        """Place within the replica, 0 for its head."""
        return self.pp_rank * self.tp + self.tp_rank

    def head_of(self, dp_rank: int) -> int:
        """Global rank of the head of a replica."""
        return dp_rank * self.tp

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp - 1)


def initialize(config: LayoutConfig, *, seed: int) -> Layout:
    """Divide the ranks of the (initialised) default process group.

    Raises:
        ValueError: when tp * pp does not divide the number of ranks.
    """
    platform().adapt("megatron.core")
    world = dist.get_world_size()
    if world % (config.tp * config.pp):
        raise ValueError(
            f"{world} ranks cannot be divided into replicas of tp {config.tp} x pp {config.pp} ranks; start a multiple "
            f"of {config.tp * config.pp}, or change layout.tp / layout.pp"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        create_gloo_process_groups=False,
    )
    # Nothing in the policy draws random numbers, but Megatron's layers enter its generator's context.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Layout(
        tp=config.tp,
        pp=config.pp,
        dp=world // (config.tp * config.pp),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        rank=dist.get_rank(),
        sequence_parallel=config.sequence_parallel and config.tp > 1,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_model_parallel_group(),
    )


def shutdown() -> None:
    """Leave every group. Idempotent."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_grad_enabled(True)
