"""This rank's place in tensor, pipeline, data and expert parallelism, and its process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.policy.row_share import RowShare
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.export import Holder
from clipo_megatron.weights.mapping import Coordinates
from clipo_megatron.weights.parallel_division import ParallelDivision


@dataclass(frozen=True)
class Layout:
    """One rank's coordinates and groups. In Megatron's order of ranks TP changes fastest, then CP, then DP, then PP.

    Experts divide the TP x CP x DP ranks of a pipeline stage in their own way: ETP changes fastest, then EP, then
    copies.
    """

    division: ParallelDivision  # the sizes of all kinds of parallelism but CP and DP
    share: RowShare  # of each packed row: this rank's place in context parallelism
    dp: int  # replicas
    tp_rank: int
    pp_rank: int
    dp_rank: int
    ep_rank: int
    etp_rank: int
    edp_rank: int  # which copy of the experts
    rank: int  # global
    sequence_parallel: bool
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup  # the tp * pp ranks that hold one copy of everything but the experts
    ep_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup

    def __str__(self) -> str:
        experts = f", ep {self.division.ep} x etp {self.division.expert_tp}" if self.division.ep > 1 else ""
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        return f"tp {self.tp}{context} x pp {self.pp} x dp {self.dp}{experts}"

    @property
    def tp(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.division.tp

    @property
    def pp(self) -> int:
        """Number of pipeline-parallel ranks."""
        return self.division.pp

    @property
    def cp(self) -> int:
        """Number of context-parallel ranks."""
        return self.share.size

    @property
    def row_multiple(self) -> int:
        """Packed rows are padded to a multiple of it, so that context and sequence parallelism can divide them."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence_parallel else 1)

    @property
    def coordinates(self) -> Coordinates:
        """This rank's place among the ranks that hold its pipeline stage together."""
        return Coordinates(
            tp=self.tp,
            tp_rank=self.tp_rank,
            ep=self.division.ep,
            ep_rank=self.ep_rank,
            etp=self.division.expert_tp,
            etp_rank=self.etp_rank,
        )

    @property
    def holder(self) -> Holder:
        """This rank as the holder of a part of the weights, for the export; groups of one rank are left out."""

        def several(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
            return group if dist.get_world_size(group) > 1 else None

        return Holder(
            at=self.coordinates,
            pp_rank=self.pp_rank,
            copy=self.dp_rank * self.cp + self.share.rank,
            expert_copy=self.edp_rank,
            tp_group=several(self.tp_group),
            etp_group=several(self.etp_group),
            ep_group=several(self.ep_group),
            pp_group=several(self.pp_group),
        )

    @property
    def world(self) -> int:
        """Number of all ranks."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm, the LM head and the contrastive head."""
        return self.pp_rank == self.pp - 1

    @property
    def is_head(self) -> bool:
        """Whether this rank leads its replica: it requests rollouts, and receives what the replica trains."""
        return self.tp_rank == 0 and self.share.rank == 0 and self.pp_rank == 0

    @property
    def leads_its_stage(self) -> bool:
        """Whether this rank writes what all ranks of its pipeline stage know."""
        return self.tp_rank == 0 and self.share.rank == 0 and self.dp_rank == 0

    def head_of(self, dp_rank: int) -> int:
        """The global rank of a replica's head."""
        return dp_rank * self.cp * self.tp

    @property
    def last_stage_rank(self) -> int:
        """The global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp - 1)


def initialize(config: LayoutConfig, *, seed: int, vpp: int = 1) -> Layout:
    """Divide the ranks of the default process group, which is initialised already.

    `vpp` is the number of model chunks a pipeline rank; training supports only one.

    Raises:
        ValueError: tp * cp * pp, or ep * etp * pp, does not divide the number of ranks.
    """
    platform().adapt("megatron.core")
    division = ParallelDivision.of(config, vpp=vpp)
    world = dist.get_world_size()
    if world % config.replica_ranks:
        raise ValueError(
            f"{world} ranks cannot be divided into replicas of tp {config.tp} x cp {config.cp} x pp {config.pp} ranks; "
            f"start a multiple of {config.replica_ranks}, or change layout.tp / layout.cp / layout.pp"
        )
    if world % (experts := division.ep * division.expert_tp * division.pp):
        raise ValueError(
            f"{world} ranks cannot be divided into copies of the experts of ep {division.ep} x etp "
            f"{division.expert_tp} x pp {division.pp} ranks; start a multiple of {experts}, or change layout.ep / "
            "layout.etp"
        )
    with platform().device_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            context_parallel_size=config.cp,
            expert_model_parallel_size=division.ep,
            expert_tensor_parallel_size=division.expert_tp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=config.distributed_timeout_s / 60,
        )
    # Nothing in the policy draws random numbers, but Megatron's layers enter its generator's context.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Layout(
        division=division,
        share=RowShare(
            parallel_state.get_context_parallel_rank(), config.cp, parallel_state.get_context_parallel_group()
        ),
        dp=world // config.replica_ranks,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
        rank=dist.get_rank(),
        sequence_parallel=config.sequence_parallel and config.tp > 1,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_model_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
    )


def shutdown() -> None:
    """Leave all process groups; calling it again does nothing."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_grad_enabled(True)
