"""History-aware policy optimisation: a reward for being shorter than before."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook
from clipo_megatron.flow import RolloutTable


class HAPO(Hook):
    """arXiv 2505.11225: adds weight * c, where c = cos(pi/2 * min(L / h, 2)), h the shortest correct response to the
    same prompt in earlier steps; correct rollouts get max(floor, c), wrong ones min(0, c).

    Prompts that were never answered right keep their reward. Assumes prompt ids that stay the same over the run, and
    prompts that come back.
    """

    def __init__(self, *, weight: float = 1.0, floor: float = -0.7):
        self.weight, self.floor = weight, floor
        self.shortest: dict[str, int] = {}  # tokens, by prompt id

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32."""
        best = torch.tensor([self.shortest.get(name, math.inf) for name in table.prompt_ids])[table.group]
        cosine = (math.pi / 2 * (table.response_length / best).clamp(max=2)).cos()
        bonus = torch.where(table.correct, cosine.clamp(min=self.floor), cosine.clamp(max=0))
        return reward + self.weight * torch.where(table.graded & best.isfinite(), bonus, 0.0)

    def after_update(self, table: RolloutTable) -> None:
        """Remember the shortest correct responses."""
        for row in table.correct.nonzero().squeeze(1).tolist():
            name = table.prompt_ids[table.group[row]]
            length = int(table.response_length[row])
            self.shortest[name] = min(self.shortest.get(name, length), length)

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"shortest": dict(self.shortest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.shortest = dict(state["shortest"])
