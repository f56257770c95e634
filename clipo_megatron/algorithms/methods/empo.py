"""EMPO: the reward is how many rollouts of the group agree on the answer. Also the reading of final answers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, HookContext, Signal
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class Answers(Hook):
    """Fills table.text_columns["answer"]. An algorithm gets it without being asked if a hook needs Signal.answers."""

    def bind(self, context: HookContext) -> None:
        self.context = context

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """The final answer, in one spelling for all that the grader's cheap rules call equal; "" if there is none."""
        return {"answer": self.context.answer(prompt, rollout)}


class EMPO(Hook):
    """arXiv 2504.05812, entropy minimised policy optimisation: the grader's reward is replaced by the share of the
    group's rollouts that give the same final answer, cluster size / G. No gold answer is read.

    Answers cluster by the grader's cheap rules of equality, where the paper asks a model. G counts graded rollouts, and
    a rollout without an answer gets 0: it agrees with nobody. What other hooks add to the reward stays. Assumes that
    the majority is right more often than not. With CLIPO the verdicts choose its anchors, and its bonus is added.
    """

    source = "arXiv 2504.05812"
    summary = "reward for the answer that most of the group give, no gold"
    needs = frozenset({Signal.answers})

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        given = list(zip(table.group.tolist(), table.text_columns["answer"], table.graded.tolist(), strict=True))
        clusters = Counter((group, answer) for group, answer, graded in given if graded and answer)
        sizes = torch.bincount(table.group[table.graded], minlength=len(table.prompt_ids))[table.group]
        alike = [clusters[group, answer] if graded else 0 for group, answer, graded in given]
        share = torch.tensor(alike, dtype=torch.float64) / sizes.clamp(min=1)
        return (reward.double() - table.reward + share).float()
