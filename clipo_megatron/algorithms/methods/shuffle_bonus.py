"""The control that CLIPO is compared with first: the same bonuses, given to others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, HookContext
from clipo_megatron.algorithms.seeds import prompt_generator, told_apart
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class ShuffleBonus(Hook):
    """A control: the bonuses of the correct rollouts of each group change places among these.

    Each group keeps the multiset of its bonuses, so that only who gets which differs from the run without it. The
    permutation is a function of (train.seed, step, prompt). It shuffles the sum of all bonuses, CLIPO's and those of
    plug-ins, wherever it stands among the plug-ins.
    """

    source = "control"
    summary = "bonuses change places among a group's correct rollouts"

    def __init__(self, options: object = None) -> None:
        super().__init__(options)
        self.seed = 0

    def bind(self, context: HookContext) -> None:
        self.seed = context.config.train.seed

    def shape_bonus(self, table: RolloutTable, bonus: Tensor) -> Tensor:
        shuffled = bonus.clone()
        for group, name in enumerate(told_apart(table.prompt_ids)):
            rows = ((table.group == group) & table.graded & table.correct).nonzero().squeeze(1)
            generator = prompt_generator(self.seed, table.step, f"{name}/shuffle_bonus")
            shuffled[rows] = bonus[rows[torch.randperm(rows.numel(), generator=generator)]]
        return shuffled
