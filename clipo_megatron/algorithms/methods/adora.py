"""Advantage dynamics by online rollout adaptation: groups in which thinking longer pays count in full."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook
from clipo_megatron.flow import RolloutTable


class ADORA(Hook):
    """arXiv 2602.10019: the advantages of a whole group times `emphasis` (1) if its longest correct response is longer
    than its wrong ones are on average, else times `weight` (0.1).

    A group without correct or without wrong responses has nothing to compare, and gets `weight`. Assumes that longer
    reasoning is wanted. CLIPO's bonus acts through the reward, before; lengths and verdicts are as they were.
    """

    def __init__(self, *, weight: float = 0.1, emphasis: float = 1.0):
        self.weight, self.emphasis = weight, emphasis

    def shape_advantage(self, table: RolloutTable, reward: Tensor, advantage: Tensor) -> Tensor:
        """[B] float32."""
        groups = len(table.prompt_ids)
        wrong = table.graded & ~table.correct
        longest = torch.zeros(groups, dtype=torch.int64).scatter_reduce(
            0, table.group[table.correct], table.response_length[table.correct], "amax"
        )
        total = torch.zeros(groups, dtype=torch.int64).index_add(0, table.group[wrong], table.response_length[wrong])
        count = torch.bincount(table.group[wrong], minlength=groups)
        longer = longest * count > total  # in whole numbers: no rounding decides; false for groups of one kind
        return advantage * torch.where(longer, self.emphasis, self.weight)[table.group]
