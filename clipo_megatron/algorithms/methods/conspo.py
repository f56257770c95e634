"""ConSPO: each correct rollout against all wrong ones of its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import MethodOptions, TokenBatch
from clipo_megatron.algorithms.policy_loss import GroupLoss, bonus_weight
from clipo_megatron.algorithms.schedule import Scheduled
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import Experience

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ConspoOptions(MethodOptions):
    tau: float = within(10.0, 1e-6)  # scale of the mean log-probs
    margin: float = 0.01  # nats a token by which correct rollouts must lead
    margin_steps: int = within(100, 0)  # steps over which the margin rises from 0; 0: it is whole from the start
    weigh_by_reward: bool = True  # correct rollouts weigh 1 + what was added to their reward, at least 0


class ConSPO(GroupLoss, Scheduled):
    """arXiv 2605.12969, contrastive sequence policy optimisation: for each correct rollout
    -log[e^u+ / (e^u+ + sum_- e^u-)], with u- over the wrong rollouts of its group.

    u- = tau s and u+ = tau (s - m), where s is the mean log-prob of a rollout's tokens. That the margin m is subtracted
    before the scale, so that a correct rollout must lead by m nats a token, and that m rises linearly from 0 to
    `margin` over `margin_steps` steps, is our reading of "scheduled margin". The mean is over the correct rollouts of a
    group, then over the groups with both kinds; groups of one kind have no loss. With `weigh_by_reward` a correct
    rollout weighs 1 + what hooks added to its reward, at least 0: there CLIPO's bonus acts. Assumes verdicts.
    """

    source = "arXiv 2605.12969"
    summary = "each correct rollout against the wrong ones of its group"
    options_class = ConspoOptions

    def scores(self, tokens: TokenBatch) -> Tensor:
        """Each token's part of s, [N, 1]."""
        return (tokens.logprobs / tokens.length)[:, None]

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        """The loss, a float64 scalar. A group's wrong rollouts enter by their log-sum-exp, so one pass is enough."""
        options, table = self.options, experience.table
        score = options.tau * scores[:, 0]
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
        margin = options.tau * self.linear(0.0, options.margin, options.margin_steps)
        losses = torch.nn.functional.softplus(
            largest[own] + total[own].log() - (score[anchors] - margin), threshold=40.0
        )
        weight = bonus_weight(experience, rows[anchors]).to(score) if options.weigh_by_reward else 1.0
        both = (right > 0) & (wrong > 0)
        return (weight * losses / right[own]).sum() / both.sum().clamp(min=1)
