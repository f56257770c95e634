"""What most baselines share: how the tokens of a mini-batch are weighed, and PPO's clipped surrogate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook, TokenBatch
from clipo_megatron.config.schema import Aggregation
from clipo_megatron.flow import Experience, RolloutTable


@dataclass(frozen=True, slots=True)
class BaselineSettings:
    """The settings that all baselines share.

    Attributes:
        clip_low, clip_high: how far a ratio of probabilities may fall below and rise above 1; not every loss clips.
        aggregation: how the tokens of a mini-batch weigh.
        constant_length: tokens, for `constant`.
    """

    clip_low: float
    clip_high: float
    aggregation: Aggregation
    constant_length: int


class PolicyLoss(Hook):
    """A baseline: what gives advantages, and the weight of each token in the loss. Subclasses take their own options
    after the shared settings, by name."""

    def __init__(self, settings: BaselineSettings):
        self.clip_low, self.clip_high = settings.clip_low, settings.clip_high
        self.aggregation, self.constant_length = settings.aggregation, settings.constant_length

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


class ClippedPolicyLoss(PolicyLoss):
    """PPO's clipped surrogate on each token: max(-rho A, -clip(rho, 1 - low, 1 + high) A), arXiv 1707.06347.

    rho is the ratio to the policy that was scored before the update; importance weights multiply the whole. Different
    low and high are DAPO's clip-higher (arXiv 2503.14476).
    """

    def log_ratio(self, tokens: TokenBatch) -> Tensor:
        """[N] float32, log of what is clipped: here each token's own ratio."""
        return tokens.logprobs - tokens.old_logprobs

    def loss(self, tokens: TokenBatch) -> Tensor:
        """[N] float32."""
        ratio = self.log_ratio(tokens).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        plain, limited = -ratio * tokens.advantages, -clipped * tokens.advantages
        tokens.metrics["policy/clip_fraction"] = (tokens.weights * (limited > plain)).sum().detach()
        surrogate = torch.maximum(plain, limited)
        return surrogate if tokens.importance is None else tokens.importance * surrogate


class GroupLoss(PolicyLoss):
    """A baseline whose loss compares whole rollouts, so that there is nothing to weigh single tokens with.

    Subclasses give `scores` and `group_loss`. The advantage is 0 and the weights those of token_mean: other stages'
    terms (KL, entropy) use them.
    """

    learns_without_advantage = True

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32, zeros."""
        return torch.zeros_like(reward)


def bonus_weight(experience: Experience, rows: Tensor) -> Tensor:
    """What each of `rows` [M] counts for by its reward, [M] float64: 1 and what stages added to the grader's reward, at
    least 0.

    The grader's own reward is left out, whatever its scale: verdicts are in the loss already. Below 0 a correct rollout
    would be pushed down.
    """
    added = experience.reward[rows].double() - experience.table.reward[rows].double()
    return (1 + added).clamp(min=0)
