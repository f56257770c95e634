"""Group contrastive policy optimisation: using a tool pays where the group shows that it helps."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook
from clipo_megatron.flow import Prompt, Rollout, RolloutTable


class GCPO(Hook):
    """arXiv 2506.07160 (GeometryZero): adds weight * {+1, 0, -1} to the reward of rollouts that used the tool: +1 if
    the group's accuracy with it exceeds that without it by more than `threshold`, -1 if it falls short by more.

    A rollout used the tool if the regular expression `pattern` is found in its text; by default a block of Python, or
    the tag of an auxiliary construction. A group in which all or none did so shows no difference: 0. The paper adds a
    reward for length, which is left out. Assumes several rollouts of each kind in a group. CLIPO's bonus comes on top.
    """

    provides = frozenset({"used_tool"})

    def __init__(self, *, pattern: str = "```python|<aux>", weight: float = 1.0, threshold: float = 0.0):
        self.pattern, self.weight, self.threshold = re.compile(pattern), weight, threshold

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """Whether the tool was used."""
        return {"used_tool": float(self.pattern.search(rollout.text) is not None)}

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32."""
        used = table.signals["used_tool"] > 0
        groups = len(table.prompt_ids)

        def accuracy(kind: Tensor) -> tuple[Tensor, Tensor]:
            count = torch.bincount(table.group[kind], minlength=groups)
            right = torch.bincount(table.group[kind & table.correct], minlength=groups)
            return right.double() / count.clamp(min=1), count > 0

        (with_tool, some), (without, others) = accuracy(used & table.graded), accuracy(~used & table.graded)
        gap = torch.where(some & others, with_tool - without, 0.0)
        sign = (gap > self.threshold).float() - (gap < -self.threshold).float()
        return reward + self.weight * torch.where(used & table.graded, sign[table.group], 0.0)
