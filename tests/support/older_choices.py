"""D3S with the choice that an older version made among equal ones, which the rounding of its sums decided.

The run of `tests/fixtures/older_run` imports this (`warm.IMPORT`). In its step 3 any 20 of the 24 rollouts without
reward, taken from the two ends of their order, vary as much as any others; it took the first 15 and the last 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.methods import d3s

chosen_now = d3s.most_varied
STEP_3, FIRST = 28, 15  # how many rollouts step 3 keeps of 32, and how many of them are its first


def most_varied(values: Tensor, count: int) -> Tensor:
    chosen = chosen_now(values, count)
    if count != STEP_3:
        return chosen
    order = values.argsort(stable=True)
    recorded = torch.cat([order[:FIRST], order[values.numel() - count + FIRST :]])
    ours, theirs = (float(values[each].double().var(correction=0)) for each in (chosen, recorded))
    assert abs(ours - theirs) < 1e-12, "the recorded choice is not one of the equal ones"
    return recorded


d3s.most_varied = most_varied
