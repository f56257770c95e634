"""Mean and variance that whitening takes out, over rollouts or tokens, on one rank or many."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def centred(
    values: Tensor, shares: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Values less their weighted mean, 0 where they have no share; and their unbiased variance. Both float64.

    With n the sum of the shares, the mean is sum(share * value) / n and the variance
    sum(share * (value - mean)^2) / (n - 1), 0 for n <= 1 value.

    Args:
        values: [n], any float dtype; those without a share are not looked at.
        shares: [n], bool or not negative: how often each value counts.
        sum_over_ranks: of the ranks that hold parts of the values, all of which call this; None: they are all here.

    Returns:
        [n], and a scalar, the same on all ranks.
    """
    total_of = sum_over_ranks or torch.clone
    shares = shares.double()
    values = torch.where(shares > 0, values.double(), 0.0)
    count, total = total_of(torch.stack([shares.sum(), (shares * values).sum()])).unbind()
    gaps = torch.where(shares > 0, values - total / count.clamp(min=1), 0.0)
    (squares,) = total_of((shares * gaps.square()).sum()[None]).unbind()
    return gaps, squares / (count - 1).clamp(min=1)
