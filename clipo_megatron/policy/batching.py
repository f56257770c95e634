"""From rollouts where they were generated to packed mini-batches where they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.device import platform
from clipo_megatron.flow import Experience, MicroBatch, MiniBatch, RolloutTable, Sample
from clipo_megatron.policy.exchange import deliver
from clipo_megatron.policy.layout import Layout
from clipo_megatron.policy.model import packs_shared_prompts
from clipo_megatron.policy.packing import pack, plan_micro_batches, units_of


@dataclass(frozen=True)
class Batcher:
    """Plans, moves and packs the rollouts of a step; the same rules for every step of a run."""

    layout: Layout
    mini_batches: int
    max_tokens: int
    share_prompts: bool

    @classmethod
    def of(cls, config: RunConfig, layout: Layout) -> Batcher:
        """As the configuration says; prompts are shared by default where the attention in use can.

        Raises:
            ValueError: sharing is asked for and the attention cannot.
        """
        wanted = config.layout.share_prompts
        if wanted and not packs_shared_prompts():
            raise ValueError(
                "layout.share_prompts is true, but transformer-engine's attention cannot attend to a shared prompt; "
                "leave it unset, or uninstall transformer-engine"
            )
        return cls(
            layout,
            config.algorithm.mini_batches,
            config.layout.max_tokens_per_microbatch,
            packs_shared_prompts() if wanted is None else wanted,
        )

    def mini_batches_of(self, samples: Sequence[Sample], table: RolloutTable) -> list[MiniBatch]:
        """Collective: every rank brings what it generated and gets what it trains, mini-batch by mini-batch.

        Mini-batches are runs of whole groups in the table's order; each is balanced over data-parallel ranks by
        itself.
        """
        owner = torch.full((table.size,), -1)
        planned: list[tuple[Tensor, list[Tensor]]] = []
        for groups in torch.arange(len(table.prompt_ids)).tensor_split(self.mini_batches):
            rows = torch.isin(table.group, groups).nonzero().squeeze(1)
            units = units_of(
                table.group[rows].tolist(),
                table.prompt_length[rows].tolist(),
                table.response_length[rows].tolist(),
                ranks=self.layout.dp,
                max_tokens=self.max_tokens,
                share_prompts=self.share_prompts,
            )
            plan = plan_micro_batches(units, self.layout.dp, self.max_tokens)
            for dp_rank, micro_batches in enumerate(plan):
                for members in micro_batches:
                    owner[rows[members]] = dp_rank
            planned.append((rows, [rows[members] for members in plan[self.layout.dp_rank]]))
        held = deliver(samples, table, owner, self.layout)
        return [
            MiniBatch(rows, [self.pack([held[row] for row in members.tolist()]) for members in mine])
            for rows, mine in planned
        ]

    def pack(self, samples: Sequence[Sample]) -> MicroBatch:
        """One micro-batch of these rollouts."""
        return pack(
            samples,
            share_prompts=self.share_prompts,
            multiple=self.layout.tp if self.layout.sequence_parallel else 1,
            device=platform().device,
        )

    def credit(self, batch: MiniBatch, experience: Experience, algorithm: Algorithm) -> MiniBatch:
        """The rows of a mini-batch that train, and micro-batches with every target's advantage and weight in the loss.

        Rollouts with advantage 0 are left out of the micro-batches where they have no gradient; they are counted in
        the weights.
        """
        rows = batch.rows[experience.keep[batch.rows]]
        weight = algorithm.token_weight(experience.table, rows)
        active = weight != 0
        if not algorithm.learns_without_advantage:
            active &= experience.advantage != 0
        credited = [self._without(micro, active) for micro in batch.micro_batches]
        for micro in credited:
            own = micro.rows[micro.rollout].cpu()
            device = micro.tokens.device
            micro.weights = weight[own].to(device)
            micro.advantages = micro.signals.get("advantage", experience.advantage[own].to(device))
        return MiniBatch(rows, credited)

    def _without(self, micro: MicroBatch, active: Tensor) -> MicroBatch:
        """The micro-batch without rollouts that are not `active` ([B] bool), scores carried over."""
        if bool(active[micro.rows.cpu()].all()):
            return micro
        smaller = self.pack([sample for sample in micro.samples if active[sample.row]])
        kept = active.to(micro.rows.device)[micro.rows][micro.rollout]
        for name in ("old_logprobs", "reference_logprobs"):
            scores = getattr(micro, name)
            setattr(smaller, name, None if scores is None else scores[kept])
        smaller.signals = {name: signal[kept] for name, signal in micro.signals.items()}
        return smaller
