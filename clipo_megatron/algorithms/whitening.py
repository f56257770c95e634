"""Whitening over rollouts or tokens, held by one rank or by many."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch

if TYPE_CHECKING:
    from torch import Tensor


def centred(
    values: Tensor, shares: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Subtract the weighted mean of the values, and compute their unbiased variance.

    With n the sum of the shares, the mean is sum(share * value) / n and the variance
    sum(share * (value - mean)^2) / (n - 1), or 0 where n <= 1.

    Args:
        values: [n], any float dtype; values without a share are ignored.
        shares: [n], bool or not negative: how often each value counts.
        sum_over_ranks: adds a tensor up over the ranks that hold parts of the values, all of which call this function;
            None: all values are here.

    Returns:
        The centred values [n] float64, 0 without a share, and the variance, a float64 scalar that is the same on all
        ranks.
    """
    total_of = sum_over_ranks or torch.clone
    shares = shares.double()
    values = torch.where(shares > 0, values.double(), 0.0)
    count, total = total_of(torch.stack([shares.sum(), (shares * values).sum()])).unbind()
    gaps = torch.where(shares > 0, values - total / count.clamp(min=1), 0.0)
    (squares,) = total_of((shares * gaps.square()).sum()[None]).unbind()
    return gaps, squares / (count - 1).clamp(min=1)
