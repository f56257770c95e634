"""More reward for correct rollouts that the policy found unlikely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, MethodOptions, Signal
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class UnlikelinessOptions(MethodOptions):
    beta: float = within(0.25, 0, 1)  # share of the reward that the likeliest rollout of a group loses


class Unlikeliness(Hook):
    """arXiv 2506.02355: the reward of a correct rollout times 1 - beta rank / G, rank 1 .. G by the scored policy's
    log-prob of the whole response within the group, the likeliest ranked highest.

    G counts graded rollouts; equal log-probs share their mean rank. The paper's wrong rollouts have reward 0, so only
    correct ones are touched. Only the grader's reward shrinks: what other hooks add to it, such as CLIPO's bonus, keeps
    its scale. Assumes several samples a prompt.
    """

    source = "arXiv 2506.02355"
    summary = "more reward for unlikely correct rollouts"
    options_class = UnlikelinessOptions
    needs = frozenset({Signal.logprob_sums})

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        sums, share = table.signals["logprob_sum"], torch.zeros(table.size, dtype=torch.float64)
        for group in range(len(table.prompt_ids)):
            rows = ((table.group == group) & table.graded).nonzero().squeeze(1)
            own = sums[rows]
            below, equal = own[:, None] > own[None], own[:, None] == own[None]
            rank = below.sum(1) + (equal.sum(1) + 1) / 2
            share[rows] = rank.double() / max(rows.numel(), 1)
        return torch.where(table.correct, reward - self.options.beta * share * table.reward, reward).float()
