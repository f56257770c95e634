"""From rollouts where they were generated to packed mini-batches where they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Demonstration, Experience, MicroBatch, MiniBatch, RolloutTable, Sample
from clipo_megatron.policy.batch.exchange import deliver
from clipo_megatron.policy.batch.packing import PackingUnit, pack, plan_micro_batches, units_of
from clipo_megatron.policy.model.model import packs_shared_prompts
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform


@dataclass(frozen=True)
class Batcher:
    """Plans, moves and packs the rollouts of a step; the same rules for every step of a run."""

    layout: Layout
    mini_batches: int
    max_tokens: int
    share_prompts: bool

    @classmethod
    def of(cls, config: RunConfig, layout: Layout) -> Batcher:
        """As the configuration says; prompts are shared by default where the attention in use can, and where rollouts
        of a group go on from the same tokens.

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
            packs_shared_prompts() and config.rollout.window_tokens is None if wanted is None else wanted,
        )

    def mini_batches_of(self, samples: Sequence[Sample], table: RolloutTable) -> list[MiniBatch]:
        """Collective: every rank brings what it generated and gets what it trains, mini-batch by mini-batch.

        Mini-batches are runs of whole groups in the table's order; each is balanced over data-parallel ranks by
        itself.
        """
        planned = self._plan(table)
        owner = torch.full((table.size,), -1)
        for rows, plan in planned:
            for dp_rank, micro_batches in enumerate(plan):
                for members in micro_batches:
                    owner[rows[members]] = dp_rank
        return self._packed(planned, deliver(samples, table, owner, self.layout))

    def mini_batches_again(self, samples: Mapping[int, Sample], table: RolloutTable) -> list[MiniBatch]:
        """As `mini_batches_of`, where every rank knows all rollouts, by row: nothing is sent."""
        return self._packed(self._plan(table), samples)

    def _plan(self, table: RolloutTable) -> list[tuple[Tensor, list[list[list[int]]]]]:
        """The rows of each mini-batch, and the places in them by data-parallel rank and micro-batch."""
        planned = []
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
            planned.append((rows, plan_micro_batches(units, self.layout.dp, self.max_tokens)))
        return planned

    def _packed(
        self, planned: Sequence[tuple[Tensor, list[list[list[int]]]]], held: Mapping[int, Sample]
    ) -> list[MiniBatch]:
        return [
            MiniBatch(
                rows,
                [self.pack([held[row] for row in rows[members].tolist()]) for members in plan[self.layout.dp_rank]],
            )
            for rows, plan in planned
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
        the weights. Demonstrations follow in micro-batches of their own.
        """
        rows = batch.rows[experience.keep[batch.rows]]
        weight = algorithm.token_weight(experience.table, rows)
        active = weight != 0
        if not algorithm.learns_without_advantage:
            active &= experience.advantage != 0
        credited = [self._without(micro.to(platform().device), active) for micro in batch.micro_batches]
        for micro in credited:
            own = micro.rows[micro.rollout].cpu()
            device = micro.tokens.device
            micro.weights = weight[own].to(device)
            micro.advantages = micro.signals.get("advantage", experience.advantage[own].to(device))
        shown = [] if experience.replayed else algorithm.demonstrate(experience.table, rows)
        return MiniBatch(rows, credited + self._demonstrated(shown))

    def _demonstrated(self, shown: Sequence[Demonstration]) -> list[MicroBatch]:
        """This rank's share of the demonstrations; the same number of micro-batches on every rank."""
        if not shown:
            return []
        sizes = [each.prompt.numel() + each.response.numel() for each in shown]
        busy = min(self.layout.dp, len(shown))
        plan = plan_micro_batches(
            [PackingUnit((place,), size) for place, size in enumerate(sizes)], busy, self.max_tokens
        )
        mine = plan[self.layout.dp_rank] if self.layout.dp_rank < busy else [[] for _ in plan[0]]
        weight = torch.tensor([each.weight for each in shown], device=platform().device)
        packed = []
        for members in mine:
            chosen = [(place, shown[place]) for place in members]
            micro = self.pack(
                [
                    Sample(place, each.group, each.prompt, each.response, torch.zeros(each.response.numel()))
                    for place, each in chosen
                ]
            )
            micro.weights, micro.demonstrated = weight[micro.rows][micro.rollout], True
            packed.append(micro)
        return packed

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
