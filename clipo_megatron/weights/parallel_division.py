"""How a model's weights are divided over ranks: by pipeline stages, tensor parallelism and expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.mapping import Coordinates, PipelineStage, even_stages


@dataclass(frozen=True, slots=True)
class ParallelDivision:
    """Megatron's parallel sizes, except for data parallelism, whose replicas hold the same weights.

    The layers are divided into `pp * vpp` chunks, in model order; chunk i belongs to pipeline rank i % pp, as Megatron
    interleaves them. Experts are divided over `ep` ranks, and each expert over `etp`.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # chunks of each pipeline rank
    ep: int = 1
    etp: int | None = None  # None: tp, as in Megatron
    first_layers: int | None = None  # on the first pipeline rank; None: as many as on the others
    last_layers: int | None = None  # on the last pipeline rank; None: as many as on the others

    @classmethod
    def of(cls, layout: LayoutConfig, *, vpp: int = 1) -> ParallelDivision:
        """Take the sizes from a configured layout."""
        return cls(
            tp=layout.tp,
            pp=layout.pp,
            vpp=vpp,
            ep=layout.ep,
            etp=layout.etp,
            first_layers=layout.first_stage_layers,
            last_layers=layout.last_stage_layers,
        )

    @property
    def expert_tp(self) -> int:
        """Number of ranks over which each expert is divided."""
        return self.tp if self.etp is None else self.etp

    def stages(self, num_layers: int) -> tuple[PipelineStage, ...]:
        """Return all chunks in model order.

        Raises:
            WeightsError: so many layers cannot be divided in this way.
        """
        if self.first_layers is None and self.last_layers is None:
            return even_stages(num_layers, self.pp * self.vpp)
        counts = self._layers_per_rank(num_layers)
        chunks = [counts[i % self.pp] // self.vpp for i in range(self.pp * self.vpp)]
        offsets = [sum(chunks[:i]) for i in range(len(chunks))]
        last = len(chunks) - 1
        return tuple(PipelineStage(offsets[i], chunks[i], first=i == 0, last=i == last) for i in range(len(chunks)))

    def owner(self, chunk: int) -> int:
        """Return the pipeline rank that has a chunk; chunks are numbered in model order."""
        return chunk % self.pp

    def dense_ranks(self) -> Iterator[Coordinates]:
        """List the ranks of one pipeline stage between which everything but the experts is divided."""
        return (Coordinates(tp=self.tp, tp_rank=rank) for rank in range(self.tp))

    def expert_ranks(self) -> Iterator[Coordinates]:
        """List the ranks of one pipeline stage between which the experts are divided."""
        for ep_rank in range(self.ep):
            for etp_rank in range(self.expert_tp):
                yield Coordinates(ep=self.ep, ep_rank=ep_rank, etp=self.expert_tp, etp_rank=etp_rank)

    def _layers_per_rank(self, num_layers: int) -> list[int]:
        """Return the number of layers of each pipeline rank where the first or last has its own number."""
        counts: list[int | None] = [None] * self.pp
        counts[0], counts[-1] = self.first_layers, self.last_layers or counts[-1]
        if self.pp == 1:
            counts = [num_layers]
        left, open_ranks = num_layers - sum(count or 0 for count in counts), counts.count(None)
        even, rest = divmod(left, open_ranks) if open_ranks else (0, left)
        if rest or left < 0 or any((even if count is None else count) % self.vpp for count in counts):
            raise WeightsError(
                f"{num_layers} layers cannot be divided over {self.pp} pipeline ranks of {self.vpp} chunks with "
                f"{self.first_layers or 'as many as others'} on the first and {self.last_layers or 'as many'} on the "
                "last; the other ranks need equal numbers, and every rank a multiple of its chunks"
            )
        return [even if count is None else count for count in counts]
