"""D3S: train on the rollouts whose advantages differ most, and on their decisive tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Optional

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import HookContext, MethodOptions, ScoredTokens, Signal
from clipo_megatron.algorithms.schedule import Scheduled
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

INFINITY_BITS = 0x7F800000  # of float32
# Choices of rollouts whose sums of squares differ by less than this share of the squared range are equal: advantages
# are float32, so no smaller difference means anything.
TIE = 1e-6


class D3sScope(str, Enum):
    """Which rollouts compete for selection."""

    batch = "batch"  # all rollouts of the step
    group = "group"  # the rollouts of each prompt


@dataclass
class D3sOptions(MethodOptions):
    rollouts: float = within(0.5, 1e-6, 1)  # share of the rollouts that trains in the first step
    tokens: float = within(0.5, 1e-6, 1)  # share of their tokens that keeps its advantage in the first step
    scope: D3sScope = D3sScope.batch  # which rollouts compete
    relax_steps: Optional[int] = within(None, 1)  # steps over which both shares rise to 1; null: train.steps


class D3S(Scheduled):
    """arXiv 2509.22115, dynamic dual-level down-sampling: keep the rollouts that maximise Var(A), and of their tokens
    those of largest |A| H.

    The number of rollouts is `rollouts` times the graded ones, rounded up, of the whole step or of each group; H is the
    entropy of the scored policy. Of the kept rollouts' tokens the share `tokens`, over the whole step, keeps its
    advantage (ties at the threshold included). The others get 0: they still count in the loss's denominator, and KL and
    entropy terms act on them. Both shares rise linearly to 1 over `relax_steps` steps in which the policy learns. A is
    computed from the shaped reward, through which CLIPO's bonus acts. The source's summary leaves the shares open: 0.5
    here. Assumes a base method that gives advantages.
    """

    source = "arXiv 2509.22115"
    summary = "rollouts of largest variance, tokens of largest |A| H"
    options_class = D3sOptions
    needs = frozenset({Signal.scored_entropy})

    def __init__(self, options: D3sOptions | None = None):
        super().__init__(options)
        self.relax_steps = self.options.relax_steps
        self._chosen: Tensor | None = None  # [B] bool, in this step

    def bind(self, context: HookContext) -> None:
        if self.relax_steps is None:
            self.relax_steps = context.config.train.steps

    def select(self, table: RolloutTable, advantage: Tensor) -> Tensor:
        groups = table.group if self.options.scope is D3sScope.group else torch.zeros_like(table.group)
        chosen = torch.zeros_like(table.graded)
        share = self._relaxed(self.options.rollouts)
        for number in groups.unique():
            rows = (table.graded & (groups == number)).nonzero().squeeze(1)
            chosen[rows[most_varied(advantage[rows], count_of(share, rows.numel()))]] = True
        self._chosen = chosen
        return chosen

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        chosen = self._chosen.to(tokens.rows.device)[tokens.rows]
        size = (advantage.abs() * tokens.signals["entropy"].clamp(min=0)).float()
        total = int(tokens.sum_over_ranks(chosen.sum()))
        least = kth_largest(size[chosen], count_of(self._relaxed(self.options.tokens), total), tokens)
        return torch.where(chosen & (size >= least), advantage, 0.0)

    def _relaxed(self, share: float) -> float:
        return self.linear(share, 1.0, self.relax_steps or 0)


def count_of(share: float, total: int) -> int:
    """`share * total` rounded up; an excess of 1e-9 over a whole number counts as rounding error."""
    return math.ceil(share * total - 1e-9)


def most_varied(values: Tensor, count: int) -> Tensor:
    """Places of the `count` of `values` [n] whose variance is largest, [count] int64; the first of equal choices.

    The best choice consists of some of the smallest and some of the largest values, for moving an inner value outward
    raises the variance. So there are count + 1 candidates, each judged by running sums: O(n log n). Where many values
    are the same, as the advantages of wrong rollouts are, many candidates are equal: rounding must not decide.
    """
    order = values.argsort(stable=True)
    ordered = values.double()[order]
    ordered = ordered - ordered[:1]
    zero = ordered.new_zeros(1)
    sums, squares = (torch.cat([zero, each.cumsum(0)]) for each in (ordered, ordered.square()))
    low = torch.arange(count + 1)  # how many of the smallest are chosen
    high = values.numel() - count + low  # where the chosen largest begin
    total, square = (each[low] + each[-1] - each[high] for each in (sums, squares))
    varied = square - total.square() / max(count, 1)
    best = int((varied >= varied.max() - TIE * ordered[-1:].square().sum()).nonzero()[0])
    return torch.cat([order[:best], order[values.numel() - count + best :]])


def kth_largest(values: Tensor, k: int, tokens: ScoredTokens) -> Tensor:
    """The k-th largest of non-negative float32 `values` over all data-parallel ranks; exact in every layout.

    Such numbers are ordered as their bits are, so a binary search of 31 counts finds it.
    """
    bits = values.contiguous().view(torch.int32)
    low, high = 0, INFINITY_BITS  # at least k values have bits >= low, fewer have bits > high
    while low < high:
        middle = (low + high + 1) // 2
        if int(tokens.sum_over_ranks((bits >= middle).sum())) >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low, dtype=torch.int32, device=values.device).view(torch.float32)
