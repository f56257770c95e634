"""Rewards from the cosines of a rollout's representation to those of its group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.config.plugin_options import Rewarded
from clipo_megatron.flow import RolloutTable


class GRACE(Hook):
    """arXiv 2510.04506: adds weight * (cos+ - cos- + 0.2 mean - 0.2 hardest) / 0.1 of the mean response states.

    The source embeds texts and knows positives and negatives by their labels; here, within the group of a rollout and
    without itself, cos+ is its mean cosine to the correct rollouts, cos- that to the wrong ones, `mean` that to all of
    them (consistency), and `hardest` the largest to a wrong one. It is paid to correct rollouts, or to all (option
    `rewarded`); to none where the group has no other correct or no other wrong rollout. There is no head: states are
    compared as they are. The source has no other reward, and so weight 1; beside verdicts of 0 and 1 less is wise.

    Assumes verdicts. CLIPO's bonus, of the same states behind its head, comes on top.
    """

    needs = frozenset({Signal.pooled_states})

    def __init__(
        self,
        *,
        weight: float = 1.0,
        consistency: float = 0.2,
        hardest: float = 0.2,
        temperature: float = 0.1,
        rewarded: Rewarded = Rewarded.correct,
    ):
        self.weight, self.consistency, self.hardest = weight, consistency, hardest
        self.temperature, self.rewarded = temperature, rewarded

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32."""
        states = normalize(table.signals["pooled_states"].double(), dim=-1)
        bonus = torch.zeros(table.size, dtype=torch.float64)
        for group in range(len(table.prompt_ids)):
            rows = ((table.group == group) & table.graded).nonzero().squeeze(1)
            cosines, correct = states[rows] @ states[rows].T, table.correct[rows]
            others = ~torch.eye(rows.numel(), dtype=torch.bool)
            right, wrong = others & correct, others & ~correct
            nearest = cosines.masked_fill(~wrong, -1.0).amax(1) if rows.numel() else cosines.new_zeros(0)
            score = _mean(cosines, right) - _mean(cosines, wrong)
            score += self.consistency * _mean(cosines, others) - self.hardest * nearest
            paid = right.any(1) & wrong.any(1) & (correct | (self.rewarded is Rewarded.all))
            bonus[rows] = torch.where(paid, score / self.temperature, 0.0)
        return reward + (self.weight * bonus).float()


def _mean(cosines: Tensor, chosen: Tensor) -> Tensor:
    """Mean of each row's `chosen` entries, 0 where there is none."""
    return (cosines * chosen).sum(1) / chosen.sum(1).clamp(min=1)
