"""GCPO: using a tool is rewarded where the group shows that it helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, MethodOptions
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.ranges import within
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GcpoOptions(MethodOptions):
    pattern: str = "```python|<aux>"  # regular expression; a response in which it is found used the tool
    weight: float = 1.0  # reward for using the tool where it helps
    threshold: float = within(0.0, 0, 1)  # difference of accuracies with and without the tool that is ignored

    def problems(self, config: RunConfig) -> Iterator[ConfigProblem]:
        try:
            re.compile(self.pattern)
        except re.error as error:
            yield ConfigProblem("pattern", f"it is no regular expression: {error}", "Correct it", self.pattern)


class GCPO(Hook):
    """arXiv 2506.07160 (GeometryZero), group contrastive policy optimisation: adds weight * {+1, 0, -1} to the reward
    of rollouts that used the tool: +1 if the group's accuracy with it exceeds that without it by more than `threshold`,
    -1 if it falls short by more.

    A rollout used the tool if the regular expression `pattern` is found in its text; by default a block of Python, or
    the tag of an auxiliary construction. A group in which all or none did so shows no difference: 0. The paper's reward
    for length is left out. Assumes several rollouts of each kind in a group. CLIPO's bonus comes on top.
    """

    source = "arXiv 2506.07160"
    summary = "reward for using a tool where it helps the group"
    options_class = GcpoOptions
    provides = frozenset({"used_tool"})

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        return {"used_tool": float(re.search(self.options.pattern, rollout.text) is not None)}

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        used = table.signals["used_tool"] > 0
        groups, threshold = len(table.prompt_ids), self.options.threshold

        def accuracy(kind: Tensor) -> tuple[Tensor, Tensor]:
            count = torch.bincount(table.group[kind], minlength=groups)
            right = torch.bincount(table.group[kind & table.correct], minlength=groups)
            return right.double() / count.clamp(min=1), count > 0

        (with_tool, some), (without, others) = accuracy(used & table.graded), accuracy(~used & table.graded)
        gap = torch.where(some & others, with_tool - without, 0.0)
        sign = (gap > threshold).float() - (gap < -threshold).float()
        return reward + self.options.weight * torch.where(used & table.graded, sign[table.group], 0.0)
