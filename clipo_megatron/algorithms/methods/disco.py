"""DisCO: scores of correct rollouts above those of wrong ones, within bounds on the KL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Optional

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import MethodOptions, TokenBatch
from clipo_megatron.algorithms.policy_loss import GroupLoss, bonus_weight, exp_where_it_acts
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import Experience

if TYPE_CHECKING:
    from torch import Tensor


class DiscoScore(str, Enum):
    log_likelihood = "log_likelihood"  # mean log-prob of the response's tokens
    likelihood_ratio = "likelihood_ratio"  # mean ratio to the policy that scored the rollouts


class Penalty(str, Enum):
    squared = "squared"
    linear = "linear"


TAU = {DiscoScore.log_likelihood: 10.0, DiscoScore.likelihood_ratio: 1.0}


@dataclass
class DiscoOptions(MethodOptions):
    score: DiscoScore = DiscoScore.log_likelihood  # what a rollout is judged by
    tau: Optional[float] = within(None, 1e-6)  # smaller: harder wrong rollouts; null: 10 for log_likelihood, else 1
    beta: float = within(1.0e3, 0)  # weight of the penalty on KL(old || new)
    delta: float = within(1.0e-4, 0)  # KL without penalty, nats a token
    penalty: Penalty = Penalty.linear  # form of the penalty on the KL beyond delta
    weigh_by_reward: bool = True  # correct rollouts weigh 1 + what was added to their reward, at least 0


class DisCO(GroupLoss):
    """arXiv 2505.12366, discriminative constrained optimisation: maximise over the correct rollouts i of a group the
    mean of s_i - tau log sum_j exp(s_j / tau), j over its wrong rollouts, minus beta [KL(old || new) - delta]_+.

    s is the mean log-prob of a rollout's tokens, or their mean ratio to the scored policy. The mean is over the correct
    rollouts of a group, then over the groups with both kinds; groups of one kind have no loss. The KL is the mean of
    log old - log new over the tokens of the mini-batch. With `weigh_by_reward` a correct rollout weighs 1 + what hooks
    added to its reward, at least 0: there CLIPO's bonus acts. Assumes verdicts.
    """

    source = "arXiv 2505.12366"
    summary = "correct rollouts against the hardest wrong ones"
    options_class = DiscoOptions

    def scores(self, tokens: TokenBatch) -> Tensor:
        """Each token's part of s, and its log old - log new; [N, 2]."""
        gap = tokens.logprobs - tokens.old_logprobs
        if self.options.score is DiscoScore.log_likelihood:
            part = tokens.logprobs
        elif tokens.score_gradient is None:
            part = gap.exp()
        else:  # rollouts of groups of one kind have no part in the loss
            part = exp_where_it_acts(gap, idle=tokens.score_gradient[:, 0] == 0)
        return torch.stack([part / tokens.length, -gap], dim=1)

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        options, table = self.options, experience.table
        tau = TAU[options.score] if options.tau is None else options.tau
        correct, group, score = table.correct[rows], table.group[rows], scores[:, 0]
        total, groups = score.new_zeros(()), 0
        for number in group.unique():
            right, wrong = (group == number) & correct, (group == number) & ~correct
            if right.any() and wrong.any():
                weight = bonus_weight(experience, rows[right]).to(score) if options.weigh_by_reward else 1.0
                hardest = tau * torch.logsumexp(score[wrong] / tau, 0)
                total, groups = total + (weight * (score[right] - hardest)).mean(), groups + 1
        excess = (scores[:, 1].sum() / table.response_length[rows].sum().clamp(min=1) - options.delta).clamp(min=0)
        cost = excess.square() if options.penalty is Penalty.squared else excess
        return -total / max(groups, 1) + options.beta * cost
