"""Discriminative constrained optimisation: scores of correct rollouts above those of wrong ones."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import TokenBatch
from clipo_megatron.algorithms.policy_loss import BaselineSettings, GroupLoss, bonus_weight
from clipo_megatron.config.group_loss_options import DiscoScore, Penalty
from clipo_megatron.flow import Experience

TAU = {DiscoScore.log_likelihood: 10.0, DiscoScore.likelihood_ratio: 1.0}


class DisCO(GroupLoss):
    """arXiv 2505.12366: max over correct rollouts of mean [s_i - tau log sum_j exp(s_j / tau)], j: the wrong ones of
    the group, minus beta [KL(old || new) - delta]_+.

    s is the mean log-prob of a rollout's tokens, or their mean ratio to the scored policy. The mean is over the
    correct rollouts of a group, then over the groups that have both kinds. KL is the mean of log old - log new over
    the tokens of the mini-batch. With `weigh_by_reward` a correct rollout counts as 1 and what stages added to its
    reward, at least 0, which is where CLIPO's bonus acts. Assumes verdicts; groups of one kind teach nothing.
    """

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        score: DiscoScore = DiscoScore.log_likelihood,
        tau: float | None = None,
        beta: float = 1e3,
        delta: float = 1e-4,
        penalty: Penalty = Penalty.linear,
        weigh_by_reward: bool = True,
    ):
        super().__init__(settings)
        self.score, self.tau = score, TAU[score] if tau is None else tau
        self.beta, self.delta, self.penalty, self.weigh_by_reward = beta, delta, penalty, weigh_by_reward

    def scores(self, tokens: TokenBatch) -> Tensor:
        """[N, 2]: parts of s, and log old - log new."""
        gap = tokens.logprobs - tokens.old_logprobs
        part = tokens.logprobs if self.score is DiscoScore.log_likelihood else gap.exp()
        return torch.stack([part / tokens.length, -gap], dim=1)

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        """Scalar float64."""
        table = experience.table
        correct, group, score = table.correct[rows], table.group[rows], scores[:, 0]
        total, groups = score.new_zeros(()), 0
        for number in group.unique():
            right, wrong = (group == number) & correct, (group == number) & ~correct
            if right.any() and wrong.any():
                weight = bonus_weight(experience, rows[right]).to(score) if self.weigh_by_reward else 1.0
                hardest = self.tau * torch.logsumexp(score[wrong] / self.tau, 0)
                total, groups = total + (weight * (score[right] - hardest)).mean(), groups + 1
        excess = (scores[:, 1].sum() / table.response_length[rows].sum().clamp(min=1) - self.delta).clamp(min=0)
        cost = excess.square() if self.penalty is Penalty.squared else excess
        return -total / max(groups, 1) + self.beta * cost
