"""Advantages of baselines that share the clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.grpo import group_statistics
from clipo_megatron.algorithms.surrogate import ClippedPolicyLoss
from clipo_megatron.flow import RolloutTable


class RLOO(ClippedPolicyLoss):
    """arXiv 2402.14740: A_i = r_i - mean of the group's other rewards.

    Assumes at least two graded rollouts a group; a group of one has A = 0.
    """

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32; 0 where ungraded."""
        mean, _, count = group_statistics(reward, table)
        # r_i - (n mean - r_i) / (n - 1)
        advantage = (reward - mean) * count / (count - 1).clamp(min=1)
        return torch.where(table.graded & (count > 1), advantage, 0.0)
