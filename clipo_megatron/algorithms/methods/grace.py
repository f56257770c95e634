"""GRACE: rewards from the cosines between a rollout's representation and those of its group."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, MethodOptions, Signal
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class Rewarded(str, Enum):
    correct = "correct"  # correct rollouts alone, as CLIPO does
    all = "all"  # wrong ones too


@dataclass
class GraceOptions(MethodOptions):
    weight: float = 1.0  # factor of the bonus, which is the whole reward in the source
    consistency: float = within(0.2, 0)  # weight of the mean cosine to the group
    hardest: float = within(0.2, 0)  # weight of the cosine to the nearest wrong rollout
    temperature: float = within(0.1, 1e-6)  # divides the bonus
    rewarded: Rewarded = Rewarded.correct  # which rollouts get the bonus


class GRACE(Hook):
    """arXiv 2510.04506: adds weight * (cos+ - cos- + consistency * mean - hardest * nearest) / temperature, of the mean
    states of the responses.

    cos+ is a rollout's mean cosine to the other correct rollouts of its group, cos- that to the wrong ones, `mean` that
    to all of them, `nearest` the largest to a wrong one; the source knows positives and negatives by labels of texts.
    The bonus is paid to correct rollouts, or to all (option `rewarded`); to none where the group has no other correct
    or no other wrong rollout. There is no head: states are compared as they are. The source has no other reward, hence
    weight 1; beside verdicts of 0 and 1 less is wise. Assumes verdicts. CLIPO's bonus comes on top, from the same
    states, projected by its head.
    """

    source = "arXiv 2510.04506"
    summary = "cosines to the group's right and wrong rollouts"
    options_class = GraceOptions
    needs = frozenset({Signal.pooled_states})

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        options = self.options
        states = torch.nn.functional.normalize(table.signals["pooled_states"].double(), dim=-1)
        bonus = torch.zeros(table.size, dtype=torch.float64)
        for group in range(len(table.prompt_ids)):
            rows = ((table.group == group) & table.graded).nonzero().squeeze(1)
            cosines, correct = states[rows] @ states[rows].T, table.correct[rows]
            others = ~torch.eye(rows.numel(), dtype=torch.bool)
            right, wrong = others & correct, others & ~correct
            nearest = cosines.masked_fill(~wrong, -1.0).amax(1) if rows.numel() else cosines.new_zeros(0)
            score = _mean(cosines, right) - _mean(cosines, wrong)
            score += options.consistency * _mean(cosines, others) - options.hardest * nearest
            paid = right.any(1) & wrong.any(1) & (correct | (options.rewarded is Rewarded.all))
            bonus[rows] = torch.where(paid, score / options.temperature, 0.0)
        return reward + (options.weight * bonus).float()


def _mean(cosines: Tensor, chosen: Tensor) -> Tensor:
    """The mean of each row's `chosen` entries, 0 where there is none."""
    return (cosines * chosen).sum(1) / chosen.sum(1).clamp(min=1)
