"""`clipo plan --dry-run`: builds the ranks of the planned layout without memory, and compares them with the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from clipo_megatron.algorithms.clipo import ContrastiveHead
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.activations import FP32
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import Assumptions
from clipo_megatron.planning.memory import trainer_memory
from clipo_megatron.planning.parameters import ParameterCount, rank_count
from clipo_megatron.policy.model.fake_process_group import fake_process_group, meta_stages
from clipo_megatron.policy.model.model import TORCH_DTYPE, PolicyStage
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import VOCAB_MULTIPLE_ON_GPUS
from clipo_megatron.weights.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """What a rank was planned to hold, and what it holds when it is built."""

    rank: int
    stage: int
    planned: ParameterCount
    built: ParameterCount
    planned_bytes: int  # of weights
    built_bytes: int  # of weights
    planned_head: int  # parameters of the contrastive head
    built_head: int

    @property
    def equal(self) -> bool:
        """Tell whether plan and build are the same to the last parameter and byte."""
        return (self.planned, self.planned_bytes, self.planned_head) == (
            self.built,
            self.built_bytes,
            self.built_head,
        )


def build_ranks(config: RunConfig, spec: ModelSpec, ranks: Iterable[int] | None = None) -> Iterator[BuiltRank]:
    """Build ranks of the configured layout one after the other, as Megatron will build them on GPUs.

    Parameters live on torch's meta device, which gives them shape and dtype but no memory. The contrastive head is
    small, and is built in memory.

    Args:
        config: the run's configuration.
        spec: the architecture of the model.
        ranks: global ranks to build; None: all of them.

    Raises:
        PlanError: there is no such rank, or Megatron cannot build it.
    """
    world, division = config.layout.requested_ranks, ParallelDivision.of(config.layout)
    dp = config.layout.replicas(world)
    memory = trainer_memory(config, spec, division, dp, Assumptions())
    head = _built_head(config, spec)
    for rank in range(world) if ranks is None else ranks:
        if not 0 <= rank < world:
            raise PlanError(f"--rank {rank}: the layout has {world} ranks, 0 to {world - 1}")
        try:
            with fake_process_group(config.layout, rank=rank, world=world) as place:
                stages = meta_stages(
                    spec,
                    place,
                    dtype=config.model.dtype,
                    vocab_multiple=VOCAB_MULTIPLE_ON_GPUS,
                    megatron=config.megatron,
                )
                built = _count(stages)
                nbytes = sum(each.numel() * each.element_size() for stage in stages for each in stage.parameters())
                planned = rank_count(
                    spec, division, place.pp_rank, place.coordinates, vocab_multiple=VOCAB_MULTIPLE_ON_GPUS
                )
        except ConfigError:
            raise
        except (AssertionError, ValueError) as error:
            raise PlanError(f"rank {rank} of {world} cannot be built: {error}") from error
        yield BuiltRank(
            rank=rank,
            stage=place.pp_rank,
            planned=planned,
            built=built,
            planned_bytes=int(memory[place.pp_rank].weights),
            built_bytes=nbytes,
            planned_head=int(memory[place.pp_rank].head) // (4 * FP32),
            built_head=head if place.is_last_stage else 0,
        )


def _count(stages: Sequence[PolicyStage]) -> ParameterCount:
    """Count parameters; an expert's are those that data parallelism does not reduce over all replicas."""
    dense = expert = 0
    for stage in stages:
        for parameter in stage.parameters():
            if getattr(parameter, "allreduce", True):
                dense += parameter.numel()
            else:
                expert += parameter.numel()
    return ParameterCount(dense, expert)


def _built_head(config: RunConfig, spec: ModelSpec) -> int:
    clipo = config.clipo
    if not clipo.enabled:
        return 0
    head = ContrastiveHead(spec.hidden_size, clipo.dim, kind=clipo.head.value, debias=clipo.debias.value)
    return sum(parameter.numel() for parameter in head.parameters())


def report(config: RunConfig, spec: ModelSpec, ranks: Sequence[int] | None, console: Console) -> bool:
    """Build ranks and print them, one line for all ranks of a stage that are alike.

    Returns:
        Whether every rank holds what was planned.
    """
    found = list(build_ranks(config, spec, ranks))
    alike: dict[tuple[object, ...], list[BuiltRank]] = {}
    for each in found:
        alike.setdefault((each.stage, each.planned, each.built, each.planned_bytes, each.built_bytes), []).append(each)
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "ranks", "planned", "built", "GB of weights", "head", ""):
        table.add_column(name, justify="left" if name in ("ranks", "") else "right", overflow="fold")
    for group in alike.values():
        each = group[0]
        table.add_row(
            str(each.stage),
            spans([one.rank for one in group]),
            f"{each.planned.total:,}",
            f"{each.built.total:,}",
            f"{each.built_bytes / 1e9:.3f}",
            f"{each.built_head:,}" if each.built_head else "",
            "equal" if all(one.equal for one in group) else "DIFFERENT",
        )
    dtype = str(TORCH_DTYPE[config.model.dtype]).removeprefix("torch.")
    console.print(
        f"\nbuilt {len(found)} of {config.layout.requested_ranks} ranks without memory, weights in {dtype}; "
        "parameters of each:",
        highlight=False,
    )
    console.print(table, highlight=False)
    return all(each.equal for each in found)


def spans(numbers: Sequence[int]) -> str:
    """Abbreviate ascending numbers: [0, 1, 2, 7] -> "0-2, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
