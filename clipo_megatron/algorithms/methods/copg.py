"""Contrastive policy gradient: differences of regularised rewards between rollouts of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Signal, TokenBatch
from clipo_megatron.algorithms.policy_loss import BaselineSettings, GroupLoss
from clipo_megatron.flow import Experience


class CoPG(GroupLoss):
    """arXiv 2406.19185: mean over pairs of (R_b(y) - R_b(y'))^2, R_b(y) = R(y) - b log(pi(y) / pi_ref(y)).

    So differences of rewards shall equal b times those of the log ratios of whole responses; no data are off-policy to
    it. Pairs are of one group: the mean is over a group's pairs, then over the groups of the mini-batch that have one.
    R is the shaped reward, where CLIPO's bonus acts. b is open in the source's summary: 0.1 here. Assumes a reference
    policy, and at least two graded rollouts a group.
    """

    needs = frozenset({Signal.reference_logprobs})

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        beta: float = 0.1,
    ):
        super().__init__(settings)
        self.beta = beta

    def scores(self, tokens: TokenBatch) -> Tensor:
        """[N, 1]: parts of log(pi / pi_ref)."""
        return (tokens.logprobs - tokens.reference_logprobs)[:, None]

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        """Scalar float64. The mean of a group's squared differences is twice its unbiased variance."""
        table = experience.table
        group, zeros = table.group[rows], scores.new_zeros(len(table.prompt_ids))
        regularised = experience.reward[rows].to(scores) - self.beta * scores[:, 0]
        count = zeros.index_add(0, group, torch.ones_like(regularised))
        mean = zeros.index_add(0, group, regularised) / count.clamp(min=1)
        spread = zeros.index_add(0, group, (regularised - mean[group]).square())
        paired = count > 1
        return (2 * spread[paired] / (count[paired] - 1)).sum() / paired.sum().clamp(min=1)
