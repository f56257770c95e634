"""ADORA: groups in which longer correct answers win count in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, MethodOptions
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class AdoraOptions(MethodOptions):
    weight: float = within(0.1, 0)  # factor of the advantages of a group whose correct rollouts are not the longer ones
    emphasis: float = within(1.0, 0)  # factor of the advantages of the other groups


class ADORA(Hook):
    """arXiv 2602.10019, advantage dynamics by online rollout adaptation: the advantages of a group times `emphasis` if
    its longest correct response is longer than its wrong ones are on average, else times `weight`.

    A group without correct or without wrong responses has nothing to compare, and gets `weight`. Assumes that longer
    reasoning is wanted. CLIPO's bonus acts before, through the reward; lengths and verdicts do not change.
    """

    source = "arXiv 2602.10019"
    summary = "less advantage where correct rollouts are not the longer ones"
    options_class = AdoraOptions

    def shape_advantage(self, table: RolloutTable, reward: Tensor, advantage: Tensor) -> Tensor:
        groups = len(table.prompt_ids)
        wrong = table.graded & ~table.correct
        longest = torch.zeros(groups, dtype=torch.int64).scatter_reduce(
            0, table.group[table.correct], table.response_length[table.correct], "amax"
        )
        total = torch.zeros(groups, dtype=torch.int64).index_add(0, table.group[wrong], table.response_length[wrong])
        count = torch.bincount(table.group[wrong], minlength=groups)
        longer = longest * count > total  # whole numbers, free of rounding; false for groups of one kind
        return advantage * torch.where(longer, self.options.emphasis, self.options.weight)[table.group]
