"""CoPG: differences of regularised rewards between the rollouts of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import MethodOptions, Signal, TokenBatch
from clipo_megatron.algorithms.policy_loss import GroupLoss
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import Experience

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CopgOptions(MethodOptions):
    beta: float = within(0.1, 1e-6)  # b, factor of a response's log(pi / pi_ref); the source tunes it to the task


class CoPG(GroupLoss):
    """arXiv 2406.19185, contrastive policy gradient: the mean over pairs of (R_b(y) - R_b(y'))^2, with
    R_b(y) = R(y) - b log(pi(y) / pi_ref(y)).

    So differences of rewards are fitted by b times those of the log ratios of whole responses, whichever policy drew
    them. Pairs are of one group: the mean is over a group's pairs, then over the groups of the mini-batch that have
    one. R is the shaped reward, in which CLIPO's bonus acts. The source's summary leaves b open: 0.1 here. Assumes a
    reference policy and at least two graded rollouts a group.
    """

    source = "arXiv 2406.19185"
    summary = "pairs of rollouts: reward differences against log-ratio differences"
    options_class = CopgOptions
    needs = frozenset({Signal.reference_logprobs})
    takes_off_policy_rollouts = True

    def scores(self, tokens: TokenBatch) -> Tensor:
        """Each token's part of log(pi / pi_ref), [N, 1]."""
        return (tokens.logprobs - tokens.reference_logprobs)[:, None]

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        """The loss, a float64 scalar. The mean of a group's squared differences is twice its unbiased variance."""
        table = experience.table
        group, zeros = table.group[rows], scores.new_zeros(len(table.prompt_ids))
        regularised = experience.reward[rows].to(scores) - self.options.beta * scores[:, 0]
        count = zeros.index_add(0, group, torch.ones_like(regularised))
        mean = zeros.index_add(0, group, regularised) / count.clamp(min=1)
        spread = zeros.index_add(0, group, (regularised - mean[group]).square())
        paired = count > 1
        return (2 * spread[paired] / (count[paired] - 1)).sum() / paired.sum().clamp(min=1)
