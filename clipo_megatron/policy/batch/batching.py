"""From rollouts on the ranks that generated them to packed mini-batches, with advantages, on those that train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import ScoredTokens
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Experience, MicroBatch, MiniBatch, RolloutTable, Sample
from clipo_megatron.policy.batch.columns import with_columns
from clipo_megatron.policy.batch.exchange import deliver, redistribute
from clipo_megatron.policy.batch.packing import pack, plan_micro_batches
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform


@dataclass(frozen=True)
class Batcher:
    """Plans, moves and packs the rollouts of a step, by the same rules in every step of a run."""

    layout: Layout
    mini_batches: int  # of a step
    max_tokens: int  # of a micro-batch
    share_prompts: bool  # whether the prompt of a group is packed once
    multiple: int = 1  # of which the tokens of a row are a multiple

    @classmethod
    def of(cls, config: RunConfig, layout: Layout) -> Batcher:
        """The batcher of a run. Unless the configuration says, prompts are shared where the rollouts of a group start
        from the same tokens."""
        wanted = config.layout.share_prompts
        return cls(
            layout,
            config.algorithm.mini_batches,
            config.layout.max_tokens_per_microbatch,
            config.rollout.window_tokens is None if wanted is None else wanted,
            layout.row_multiple * _quantized_block(config.megatron),
        )

    def mini_batches_of(self, samples: Sequence[Sample], table: RolloutTable) -> list[MiniBatch]:
        """Divide a step's rollouts into mini-batches and send them to the ranks that train them; collective.

        A mini-batch holds consecutive whole groups of the table. Each is balanced over data-parallel ranks by itself.

        Args:
            samples: the rollouts that this rank generated.
            table: the step's facts.

        Returns:
            The mini-batches, with this rank's share of each.
        """
        planned = self._plan(table)
        owner = torch.full((table.size,), -1)
        for rows, plan in planned:
            for dp_rank, micro_batches in enumerate(plan):
                for members in micro_batches:
                    owner[rows[members]] = dp_rank
        return self._packed(planned, deliver(samples, table, owner, self.layout))

    def repack_mini_batches(self, samples: Mapping[int, Sample], table: RolloutTable) -> list[MiniBatch]:
        """Plan and pack as `mini_batches_of` does, from all rollouts by row, which every rank has: nothing is sent."""
        return self._packed(self._plan(table), samples)

    def _plan(self, table: RolloutTable) -> list[tuple[Tensor, list[list[list[int]]]]]:
        """The rows of each mini-batch, and the places in them for each data-parallel rank and micro-batch."""
        planned = []
        for groups in torch.arange(len(table.prompt_ids)).tensor_split(self.mini_batches):
            rows = torch.isin(table.group, groups).nonzero().squeeze(1)
            if rows.numel() < self.layout.dp:
                raise ValueError(
                    f"{rows.numel()} rollouts cannot keep {self.layout.dp} data-parallel ranks busy; raise "
                    "data.prompts_per_step or rollout.samples_per_prompt, or lower algorithm.mini_batches or layout.dp"
                )
            planned.append((rows, self._plan_of(table, rows)))
        return planned

    def _plan_of(self, table: RolloutTable, rows: Tensor) -> list[list[list[int]]]:
        """The places in `rows` for each data-parallel rank and micro-batch."""
        return plan_micro_batches(
            tuple(table.group[rows].tolist()),
            tuple(table.prompt_length[rows].tolist()),
            tuple(table.response_length[rows].tolist()),
            ranks=self.layout.dp,
            max_tokens=self.max_tokens,
            share_prompts=self.share_prompts,
        )

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
        """Pack rollouts into one micro-batch, by this run's rules."""
        return pack(
            samples,
            share_prompts=self.share_prompts,
            multiple=self.multiple,
            device=platform().device,
        )

    def assign_token_advantages(self, experience: Experience, algorithm: Algorithm) -> None:
        """Fill `token_advantages`, and `returns` for a critic, of every scored micro-batch; collective.

        Does nothing where no hook gives tokens advantages of their own, and on pipeline stages before the last.
        """
        if not algorithm.assigns_token_advantages or not self.layout.is_last_stage:
            return
        micro_batches = [micro for batch in experience.mini_batches for micro in batch.micro_batches]
        counts = [micro.rows.numel() for micro in micro_batches]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        tokens = ScoredTokens(
            rows=torch.cat([micro.rows[micro.rollout] for micro in micro_batches]),
            rollout=torch.cat([micro.rollout + start for micro, start in zip(micro_batches, starts, strict=True)]),
            old_logprobs=torch.cat([micro.old_logprobs for micro in micro_batches]),
            signals={
                name: torch.cat([micro.signals[name] for micro in micro_batches]) for name in micro_batches[0].signals
            },
            sum_over_ranks=self._sum_over_ranks,
            reference_logprobs=None
            if micro_batches[0].reference_logprobs is None
            else torch.cat([micro.reference_logprobs for micro in micro_batches]),
        )
        advantages = algorithm.token_advantage(tokens, experience.table, experience.advantage)
        sizes = [micro.predict.numel() for micro in micro_batches]
        for micro, own in zip(micro_batches, advantages.split(sizes), strict=True):
            micro.token_advantages = own
        if tokens.returns is not None:
            for micro, own in zip(micro_batches, tokens.returns.split(sizes), strict=True):
                micro.returns = own

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        if self.layout.dp > 1:
            dist.all_reduce(total, group=self.layout.dp_group)
        return total

    def with_advantages(self, batch: MiniBatch, experience: Experience, algorithm: Algorithm) -> MiniBatch:
        """Return the rows of a mini-batch that train, with the advantage and weight of every target; collective.

        Rollouts with advantage 0 are left out of the micro-batches where they have no gradient; they count in the
        weights all the same. The others are then planned again, and move to the ranks that train them. Demonstrations
        follow in micro-batches of their own.
        """
        rows = batch.rows[experience.keep[batch.rows]]
        weight = algorithm.token_weight(experience.table, rows)
        active = weight != 0
        if not algorithm.learns_without_advantage:
            active &= experience.advantage != 0
        micro_batches = self._planned_again(batch, active, experience.table)
        for micro in micro_batches:
            own = micro.rows[micro.rollout].cpu()
            device = micro.tokens.device
            micro.weights = weight[own].to(device)
            if micro.token_advantages is None:
                micro.advantages = experience.advantage[own].to(device)
            else:
                micro.advantages = micro.token_advantages
        return MiniBatch(rows, micro_batches + self._demonstrations(experience, rows))

    def _demonstrations(self, experience: Experience, rows: Tensor) -> list[MicroBatch]:
        """This rank's share of the demonstrations of the groups of `rows`, among which each group counts alike.

        Every rank has the same number of micro-batches.
        """
        groups = experience.table.group[rows].unique().tolist()
        shown = [experience.demonstrations[group] for group in groups if group in experience.demonstrations]
        if not shown:
            return []
        sizes = [each.prompt.numel() + each.response.numel() for each in shown]
        count, ranks = len(sizes), self.layout.dp
        plan = plan_micro_batches(
            tuple(range(count)),
            (0,) * count,
            tuple(sizes),
            ranks=ranks,
            max_tokens=self.max_tokens,
            share_prompts=False,
        )
        mine = plan[self.layout.dp_rank]
        weight = torch.tensor(
            [each.weight / (len(groups) * each.response.numel()) for each in shown], device=platform().device
        )
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

    def _planned_again(self, batch: MiniBatch, active: Tensor, table: RolloutTable) -> list[MicroBatch]:
        """This rank's micro-batches of the rollouts that are `active` [B] bool, planned without the others; collective.

        If all rollouts of the mini-batch are, the micro-batches stay as they are.
        """
        rows = batch.rows[active[batch.rows]]
        if rows.numel() == batch.rows.numel():
            return [micro.to(platform().device) for micro in batch.micro_batches]
        plan = self._plan_of(table, rows)
        owner = torch.full((table.size,), -1)
        for dp_rank, micro_batches in enumerate(plan):
            for members in micro_batches:
                owner[rows[members]] = dp_rank
        held = redistribute(batch.micro_batches, owner, self.layout)
        packed = (self.pack([held.samples[row] for row in rows[each].tolist()]) for each in plan[self.layout.dp_rank])
        return [with_columns(micro, held.parts, held.nothing) for micro in packed]


def _quantized_block(megatron: Mapping[str, Any]) -> int:
    """The tokens of which a row must be a multiple so that products of 8- and 4-bit factors take it; 1 without them.

    transformer-engine's kernels want 16, its recipe of blocks scales 128 tokens together, and mxfp8 32.
    """
    if megatron.get("fp8") is None and megatron.get("fp4") is None:
        return 1
    return {"blockwise": 128, "mxfp8": 32}.get(megatron.get("fp8_recipe", ""), 16)
