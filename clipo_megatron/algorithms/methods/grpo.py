"""GRPO and Dr. GRPO: the rewards of a prompt's other rollouts are the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.policy_loss import ClippedPolicyLoss
from clipo_megatron.config.schema import Aggregation
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

# Added to the standard deviation of a group's rewards, as in the released code of arXiv 2402.03300.
STD_EPSILON = 1e-6


def group_statistics(reward: Tensor, table: RolloutTable) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation and count of the graded rollouts of each rollout's group; [B] float64 each.

    A group of one has standard deviation 0. Float32 would not do: where the rewards of a group differ by their bonuses
    alone, the mean's rounding error divided by their small deviation would be 1e-5 of an advantage.
    """
    groups = len(table.prompt_ids)
    kept = table.graded.to(torch.float64)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64).index_add_(0, table.group, values * kept)[table.group]

    values = reward.double()
    count = total(torch.ones_like(values))
    mean = total(values) / count.clamp(min=1)
    variance = total((values - mean).square()) / (count - 1).clamp(min=1)
    return mean, variance.sqrt(), count


class GRPO(ClippedPolicyLoss):
    """arXiv 2402.03300, group-relative policy optimisation: A = (r - mean) / (std + 1e-6) over the group, unbiased std.

    Assumes outcome rewards and at least two graded rollouts a group; a group of one or of equal rewards has A = 0.
    """

    source = "arXiv 2402.03300"
    summary = "group mean and standard deviation"

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        mean, std, count = group_statistics(reward, table)
        advantage = (reward - mean) / (std + STD_EPSILON)
        return torch.where(table.graded & (count > 1), advantage, 0.0).float()


class DrGRPO(ClippedPolicyLoss):
    """arXiv 2503.20783: A = r - mean, and a token sum over a constant length, so that neither the difficulty of a
    prompt nor the length of a response biases the loss."""

    source = "arXiv 2503.20783"
    summary = "group mean alone, token sum over a constant length"
    default_aggregation = Aggregation.constant

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        mean, _, count = group_statistics(reward, table)
        return torch.where(table.graded & (count > 1), reward - mean, 0.0).float()
