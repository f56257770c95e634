"""Group-relative policy optimisation and its unbiased form."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.base import Stage, TokenBatch
from clipo_megatron.config.schema import Aggregation
from clipo_megatron.flow import RolloutTable

# Added to the standard deviation of a group's rewards (arXiv 2402.03300, released code).
STD_EPSILON = 1e-6


def group_statistics(reward: Tensor, table: RolloutTable) -> tuple[Tensor, Tensor, Tensor]:
    """Of the graded rollouts of each rollout's group: mean, unbiased standard deviation, and count, each [B] float32.

    A group of one has standard deviation 0.
    """
    groups = len(table.prompt_ids)
    kept = table.graded.to(torch.float64)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64).index_add_(0, table.group, values * kept)[table.group]

    values = reward.double()
    count = total(torch.ones_like(values))
    mean = total(values) / count.clamp(min=1)
    variance = total((values - mean).square()) / (count - 1).clamp(min=1)
    return mean.float(), variance.sqrt().float(), count.float()


class ClippedPolicyLoss(Stage):
    """PPO's clipped surrogate on each token: max(-rho A, -clip(rho, 1 - low, 1 + high) A), arXiv 1707.06347.

    rho is the ratio to the policy that was scored before the update; importance weights multiply the whole. Different
    low and high are DAPO's clip-higher (arXiv 2503.14476).
    """

    def __init__(self, clip_low: float, clip_high: float, aggregation: Aggregation, constant_length: int):
        self.clip_low, self.clip_high = clip_low, clip_high
        self.aggregation, self.constant_length = aggregation, constant_length

    def loss(self, tokens: TokenBatch) -> Tensor:
        """[N] float32."""
        ratio = (tokens.logprobs - tokens.old_logprobs).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        plain, limited = -ratio * tokens.advantages, -clipped * tokens.advantages
        tokens.metrics["policy/clip_fraction"] = (tokens.weights * (limited > plain)).sum().detach()
        surrogate = torch.maximum(plain, limited)
        return surrogate if tokens.importance is None else tokens.importance * surrogate

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor:
        """Weight of each response token over global counts, [B] float32.

        token_mean 1 / sum of lengths; sequence_mean 1 / (rollouts * own length); constant 1 / (rollouts * constant).
        """
        lengths = table.response_length[rows].float()
        if self.aggregation is Aggregation.token_mean:
            per_token = (1.0 / lengths.sum()).expand_as(lengths)
        elif self.aggregation is Aggregation.sequence_mean:
            per_token = 1.0 / (lengths.numel() * lengths)
        else:
            per_token = torch.full_like(lengths, 1.0 / (max(lengths.numel(), 1) * self.constant_length))
        weight = torch.zeros(table.size)
        weight[rows] = per_token
        return weight


class GRPO(ClippedPolicyLoss):
    """arXiv 2402.03300: A = (r - mean) / (std + 1e-6) over the group, unbiased std.

    Assumes outcome rewards and at least two graded rollouts a group; a group of one or of equal rewards has A = 0.
    """

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32; 0 where ungraded."""
        mean, std, count = group_statistics(reward, table)
        advantage = (reward - mean) / (std + STD_EPSILON)
        return torch.where(table.graded & (count > 1), advantage, 0.0)


class DrGRPO(ClippedPolicyLoss):
    """arXiv 2503.20783: A = r - mean, and a token sum over a constant length: no bias by difficulty or length."""

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32; 0 where ungraded."""
        mean, _, count = group_statistics(reward, table)
        return torch.where(table.graded & (count > 1), reward - mean, 0.0)
