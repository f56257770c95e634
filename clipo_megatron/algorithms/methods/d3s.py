"""Dynamic dual-level down-sampling: the rollouts whose advantages differ most, and their decisive tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import HookContext, ScoredTokens, Signal
from clipo_megatron.algorithms.schedule import Scheduled
from clipo_megatron.config.plugin_options import D3sScope
from clipo_megatron.flow import RolloutTable

LARGEST = 0x7F800000  # bits of +inf, as float32


class D3S(Scheduled):
    """arXiv 2509.22115: keep the rollouts that maximise Var(A), and of their tokens those of largest |A| H.

    N is `rollouts` times the graded rollouts, rounded up, of the whole step or of each group; H is the entropy of the
    scored policy. Of those rollouts' tokens the share `tokens`, over the whole step, keeps its advantage, others get
    0: they still count in the loss's denominator, and KL and entropy terms act on them. Tokens as large as the last
    that is kept are kept too. Both shares rise linearly to 1 over `relax_steps` steps in which the policy learns;
    None: over the run. A is of the shaped reward, where CLIPO's bonus acts. The shares are open in the source's
    summary: 0.5 here. Assumes a baseline that gives advantages.
    """

    credits_tokens = True
    needs = frozenset({Signal.scored_entropy})

    def __init__(
        self,
        *,
        rollouts: float = 0.5,
        tokens: float = 0.5,
        scope: D3sScope = D3sScope.batch,
        relax_steps: int | None = None,
    ):
        super().__init__()
        self.rollouts, self.tokens, self.scope, self.relax_steps = rollouts, tokens, scope, relax_steps
        self._chosen: Tensor | None = None  # [B] bool, in this step

    def bind(self, context: HookContext) -> None:
        """Learn how long the run is."""
        if self.relax_steps is None:
            self.relax_steps = context.config.train.steps

    def select(self, table: RolloutTable, advantage: Tensor) -> Tensor:
        """[B] bool."""
        groups = table.group if self.scope is D3sScope.group else torch.zeros_like(table.group)
        chosen = torch.zeros_like(table.graded)
        share = self._now(self.rollouts)
        for number in groups.unique():
            rows = (table.graded & (groups == number)).nonzero().squeeze(1)
            chosen[rows[most_varied(advantage[rows], count_of(share, rows.numel()))]] = True
        self._chosen = chosen
        return chosen

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """[N] float32."""
        chosen = self._chosen.to(tokens.rows.device)[tokens.rows]
        size = (advantage.abs() * tokens.signals["entropy"].clamp(min=0)).float()
        total = int(tokens.sum_over_ranks(chosen.sum()))
        least = kth_largest(size[chosen], count_of(self._now(self.tokens), total), tokens)
        return torch.where(chosen & (size >= least), advantage, 0.0)

    def _now(self, share: float) -> float:
        return self.linear(share, 1.0, self.relax_steps or 0)


def count_of(share: float, total: int) -> int:
    """A share of `total`, rounded up; rounding of the share itself adds none."""
    return math.ceil(share * total - 1e-9)


def most_varied(values: Tensor, count: int) -> Tensor:
    """Places of the `count` of `values` [n] whose variance is largest, [count] int64; of equal ones the first.

    Such a choice is of the smallest and the largest: moving an inner value outward raises the variance. So there are
    count + 1 candidates, each judged by running sums: O(n log n).
    """
    order = values.argsort(stable=True)
    ordered = values.double()[order]
    ordered = ordered - ordered.mean()
    zero = ordered.new_zeros(1)
    sums, squares = (torch.cat([zero, each.cumsum(0)]) for each in (ordered, ordered.square()))
    low = torch.arange(count + 1)  # how many of the smallest
    high = values.numel() - count + low  # where the largest begin
    total, square = (each[low] + each[-1] - each[high] for each in (sums, squares))
    best = int((square - total.square() / max(count, 1)).argmax())
    return torch.cat([order[:best], order[values.numel() - count + best :]])


def kth_largest(values: Tensor, k: int, tokens: ScoredTokens) -> Tensor:
    """The k-th largest of non-negative float32 `values` over all data-parallel ranks; exact, whatever the layout.

    Such numbers are ordered as their bits are, so 31 counts find it.
    """
    bits = values.contiguous().view(torch.int32)
    low, high = 0, LARGEST  # at least k values have bits >= low, fewer have bits > high
    while low < high:
        middle = (low + high + 1) // 2
        if int(tokens.sum_over_ranks((bits >= middle).sum())) >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low, dtype=torch.int32, device=values.device).view(torch.float32)
