"""Contrastive sequence policy optimisation: each correct rollout against all wrong ones of its group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from clipo_megatron.algorithms.hook import TokenBatch
from clipo_megatron.algorithms.policy_loss import BaselineSettings, GroupLoss, bonus_weight
from clipo_megatron.algorithms.schedule import Scheduled
from clipo_megatron.flow import Experience


class ConSPO(GroupLoss, Scheduled):
    """arXiv 2605.12969: for each correct rollout -log[e^u+ / (e^u+ + sum_- e^u-)], u- over the group's wrong ones.

    u- = tau s and u+ = tau (s - m), s the mean log-prob of a rollout's tokens. That the margin m is taken from the
    correct rollout's score before the scale, so that it must lead by m nats a token, and that m rises linearly from 0
    to `margin` over `margin_steps` steps, is our reading of "scheduled margin". The mean is over the correct rollouts
    of a group, then over the groups that have both kinds; groups of one kind teach nothing. With `weigh_by_reward` a
    correct rollout counts as 1 and what stages added to its reward, at least 0, which is where CLIPO's bonus acts.
    Assumes verdicts.
    """

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        tau: float = 10.0,
        margin: float = 0.01,
        margin_steps: int = 100,
        weigh_by_reward: bool = True,
    ):
        GroupLoss.__init__(self, settings)
        Scheduled.__init__(self)
        self.tau, self.margin, self.margin_steps = tau, margin, margin_steps
        self.weigh_by_reward = weigh_by_reward

    def scores(self, tokens: TokenBatch) -> Tensor:
        """[N, 1]: parts of s."""
        return (tokens.logprobs / tokens.length)[:, None]

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        """Scalar float64, in one pass over the rollouts: the wrong ones of a group enter by their log-sum-exp."""
        table, score = experience.table, self.tau * scores[:, 0]
        correct, group = table.correct[rows], table.group[rows]
        groups = len(table.prompt_ids)
        zeros = score.new_zeros(groups)
        right = zeros.index_add(0, group, correct.to(score))
        wrong = zeros.index_add(0, group, (~correct).to(score))
        largest = score.detach().new_full((groups,), -torch.inf)
        largest = largest.scatter_reduce(0, group[~correct], score.detach()[~correct], "amax")
        total = zeros.index_add(0, group[~correct], (score - largest[group])[~correct].exp())
        anchors = correct & (wrong[group] > 0)
        own = group[anchors]
        margin = self.tau * self.linear(0.0, self.margin, self.margin_steps)
        losses = softplus(largest[own] + total[own].log() - (score[anchors] - margin), threshold=40.0)
        weight = bonus_weight(experience, rows[anchors]).to(score) if self.weigh_by_reward else 1.0
        both = (right > 0) & (wrong > 0)
        return (weight * losses / right[own]).sum() / both.sum().clamp(min=1)
