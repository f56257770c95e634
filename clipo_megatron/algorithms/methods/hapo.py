"""HAPO: a reward for being shorter than the shortest correct response so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, MethodOptions
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import Experience, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class HapoOptions(MethodOptions):
    weight: float = within(1.0, 0)  # factor of the length reward
    floor: float = within(-0.7, -1, 1)  # smallest length reward of a correct rollout


class HAPO(Hook):
    """arXiv 2505.11225, history-aware policy optimisation: adds weight * c, where c = cos(pi/2 * min(L / h, 2)), L is
    the length of the response and h that of the shortest correct one to the same prompt in earlier steps. Correct
    rollouts get max(floor, c), wrong ones min(0, c).

    Prompts that were never answered right keep their reward. Assumes prompts that come back under the same id.
    """

    source = "arXiv 2505.11225"
    summary = "reward for the shortest correct answers so far"
    options_class = HapoOptions

    def __init__(self, options: HapoOptions | None = None):
        super().__init__(options)
        self.shortest: dict[str, int] = {}  # length in tokens by prompt id

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        best = torch.tensor([self.shortest.get(name, math.inf) for name in table.prompt_ids])[table.group]
        cosine = (math.pi / 2 * (table.response_length / best).clamp(max=2)).cos()
        bonus = torch.where(table.correct, cosine.clamp(min=self.options.floor), cosine.clamp(max=0))
        return reward + self.options.weight * torch.where(table.graded & best.isfinite(), bonus, 0.0)

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        table = experience.table
        for row in table.correct.nonzero().squeeze(1).tolist():
            name = table.prompt_ids[table.group[row]]
            length = int(table.response_length[row])
            self.shortest[name] = min(self.shortest.get(name, length), length)

    def state_dict(self) -> dict[str, Any]:
        return {"shortest": dict(self.shortest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shortest = dict(state["shortest"])
