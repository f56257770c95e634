"""RLOO, REINFORCE++ and REINFORCE++-baseline: other advantages for PPO's clipped loss."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import HookContext, MethodOptions, ScoredTokens
from clipo_megatron.algorithms.methods.grpo import STD_EPSILON, group_statistics
from clipo_megatron.algorithms.methods.ppo import discounted_sums, tokens_left
from clipo_megatron.algorithms.policy_loss import ClippedPolicyLoss, PolicyLossSettings
from clipo_megatron.algorithms.whitening import centred
from clipo_megatron.config.schema import KLPlace
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class WhitenOver(str, Enum):
    tokens = "tokens"  # a rollout counts as often as it has tokens
    rollouts = "rollouts"  # every rollout counts once


@dataclass
class WhitenOptions(MethodOptions):
    over: WhitenOver = WhitenOver.tokens  # what the batch's mean and deviation are computed over


class RLOO(ClippedPolicyLoss):
    """arXiv 2402.14740, REINFORCE leave-one-out: A_i = r_i - mean of the group's other rewards.

    Assumes at least two graded rollouts a group; a group of one has A = 0.
    """

    source = "arXiv 2402.14740"
    summary = "mean reward of the group's other rollouts"

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        mean, _, count = group_statistics(reward, table)
        # r_i - (n mean - r_i) / (n - 1)
        advantage = (reward - mean) * count / (count - 1).clamp(min=1)
        return torch.where(table.graded & (count > 1), advantage, 0.0).float()


class ReinforcePP(ClippedPolicyLoss):
    """arXiv 2501.03262, REINFORCE++: A = (r - mean) / (std + 1e-6) over the step's whole batch, unbiased std.

    Mean and deviation are over the batch's tokens, each with its rollout's return, as in released code, or over its
    rollouts (option `over`). The paper's KL penalty inside the reward is algorithm.kl with `place: reward`: a token's
    return is then r less the KL from that token on, so tokens have advantages of their own. The rollouts' `advantage`
    is then no advantage yet, so hooks that scale it are refused.

    Assumes rewards of one scale over all prompts; a group may have a single rollout. CLIPO's bonus acts through the
    reward, and its constant part does not vanish here.
    """

    source = "arXiv 2501.03262"
    summary = "rewards whitened over the batch"
    options_class = WhitenOptions
    needs_groups = False
    reads_token_rewards = True

    def __init__(self, settings: PolicyLossSettings, options: WhitenOptions | None = None):
        super().__init__(settings, options)
        self.kl_in_reward = False

    def bind(self, context: HookContext) -> None:
        kl = context.config.algorithm.kl
        self.kl_in_reward = kl.coefficient != 0 and kl.place is KLPlace.reward

    @property
    def assigns_token_advantages(self) -> bool:
        """Whether the KL in the reward gives tokens returns of their own."""
        return self.kl_in_reward

    def outcome(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """The rewards [B] that are whitened."""
        return reward

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """The whitened rewards, [B] float32, 0 where ungraded; not yet whitened if tokens have returns of their own."""
        outcome = self.outcome(table, reward)
        if self.kl_in_reward:
            return torch.where(table.graded, outcome, 0.0).float()
        counts = table.graded.double() * (table.response_length if self.options.over is WhitenOver.tokens else 1)
        gaps, variance = centred(outcome, counts)
        return (gaps / (variance.sqrt() + STD_EPSILON)).float()

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """The returns of tokens, whitened over the tokens of all ranks, where rewards of tokens give them any."""
        if not self.kl_in_reward:
            return advantage
        returns = advantage.double()
        if tokens.rewards is not None:
            returns = returns + discounted_sums(tokens.rewards.double(), tokens_left(tokens.rollout), 1.0)
        share = table.graded.double().to(returns.device)[tokens.rows]
        if self.options.over is WhitenOver.rollouts:
            share = share / torch.bincount(tokens.rollout)[tokens.rollout]
        gaps, variance = centred(returns, share, tokens.sum_over_ranks)
        return (gaps / (variance.sqrt() + STD_EPSILON)).float()


class ReinforcePPBaseline(ReinforcePP):
    """arXiv 2501.03262, REINFORCE++-baseline: the group's mean is subtracted first, then A is whitened over the batch.

    Assumes at least two graded rollouts a group; a group of one has A = 0 before whitening. CLIPO's bonus acts through
    the reward.
    """

    summary = "group mean taken off, then whitened over the batch"
    needs_groups = True

    def outcome(self, table: RolloutTable, reward: Tensor) -> Tensor:
        return reward - group_statistics(reward, table)[0]
