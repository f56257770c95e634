"""Advantages of baselines that share the clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import HookContext, ScoredTokens
from clipo_megatron.algorithms.methods.grpo import STD_EPSILON, group_statistics
from clipo_megatron.algorithms.methods.ppo import discounted_sums, tokens_left
from clipo_megatron.algorithms.policy_loss import BaselineSettings, ClippedPolicyLoss
from clipo_megatron.algorithms.whitening import centred
from clipo_megatron.config.baseline_options import WhitenOver
from clipo_megatron.config.schema import KLPlace
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
        return torch.where(table.graded & (count > 1), advantage, 0.0).float()


class ReinforcePP(ClippedPolicyLoss):
    """arXiv 2501.03262, REINFORCE++: A = (r - mean) / (std + 1e-6) over the step's whole batch, unbiased std.

    Mean and deviation are over the batch's tokens, each with its rollout's return, as in released code, or over its
    rollouts (option `over`). The paper's KL penalty inside the reward is algorithm.kl with `place: reward`: a token's
    return is then r less the KL from that token on, and tokens have advantages of their own; what stages make of the
    rollouts' `advantage` before is no advantage yet, so those that scale it are refused.

    Assumes rewards of one scale over all prompts; a group may have a single rollout. CLIPO's bonus acts through the
    reward, and its constant part does not vanish here.
    """

    reads_token_rewards = True

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        over: WhitenOver = WhitenOver.tokens,
    ):
        super().__init__(settings)
        self.over = over

    def bind(self, context: HookContext) -> None:
        """Tokens have returns of their own where the KL is in the reward."""
        kl = context.config.algorithm.kl
        self.credits_tokens = kl.coefficient != 0 and kl.place is KLPlace.reward

    def outcome(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B], what is whitened."""
        return reward

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32; 0 where ungraded. Not whitened yet where tokens have returns of their own."""
        outcome = self.outcome(table, reward)
        if self.credits_tokens:
            return torch.where(table.graded, outcome, 0.0).float()
        counts = table.graded.double() * (table.response_length if self.over is WhitenOver.tokens else 1)
        gaps, variance = centred(outcome, counts)
        return (gaps / (variance.sqrt() + STD_EPSILON)).float()

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """[N] float32; with rewards of tokens their returns, whitened over the tokens of all ranks."""
        if not self.credits_tokens:
            return advantage
        returns = advantage.double()
        if tokens.rewards is not None:
            returns = returns + discounted_sums(tokens.rewards.double(), tokens_left(tokens.rollout), 1.0)
        share = table.graded.double().to(returns.device)[tokens.rows]
        if self.over is WhitenOver.rollouts:
            share = share / torch.bincount(tokens.rollout)[tokens.rollout]
        gaps, variance = centred(returns, share, tokens.sum_over_ranks)
        return (gaps / (variance.sqrt() + STD_EPSILON)).float()


class ReinforcePPBaseline(ReinforcePP):
    """arXiv 2501.03262, REINFORCE++-baseline: the group's mean is taken off first, then A is whitened over the batch.

    Assumes at least two graded rollouts a group; a group of one has A = 0 before whitening. CLIPO's bonus acts through
    the reward.
    """

    def outcome(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B], what is whitened."""
        return reward - group_statistics(reward, table)[0]
