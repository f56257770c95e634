"""Adam that keeps its books as transformer-engine's FusedAdam does (2.11: pytorch/optimizers/fused_adam.py, `step`).

The number of updates is an entry of each parameter group, and the first update creates it. A parameter's moments are
created when it has no state at all. apex's FusedAdam does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW, with bias correction by the group's count of updates."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_: Any):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group["step"] + 1 if "step" in group else 1
            for parameter in group["params"]:
                self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if parameter.grad is None:
            return
        (first, second), updates = group["betas"], group["step"]
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        mean, square = state["exp_avg"] / (1 - first**updates), state["exp_avg_sq"] / (1 - second**updates)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))
