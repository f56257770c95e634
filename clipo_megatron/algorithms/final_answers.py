"""Final answers as text, and rewards from how the answers of a group agree."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook, HookContext, Signal
from clipo_megatron.flow import Prompt, Rollout, RolloutTable


class Answers(Hook):
    """Fills table.words["answer"]; an algorithm with a stage that needs Signal.answers gets it by itself."""

    def __init__(self) -> None:
        self.context: HookContext | None = None

    def bind(self, context: HookContext) -> None:
        """Keep the way to read an answer."""
        self.context = context

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """The final answer, equal texts for answers that the grader's cheap rules call equal; "" if there is none."""
        return {"answer": self.context.answer(prompt, rollout)}


class EMPO(Hook):
    """arXiv 2504.05812, entropy minimised policy optimisation: in place of the grader's reward the share of the group's
    rollouts that give the same final answer, cluster size / G. No gold answer is read.

    Answers cluster by the grader's cheap rules of equality; the paper asks a model for free text. G counts graded
    rollouts, and a rollout without an answer gets 0: it agrees with nobody. What other stages add to the reward stays.
    Assumes that the majority is right more often than not. With CLIPO the verdicts choose its anchors, and its bonus
    is added.
    """

    needs = frozenset({Signal.answers})

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32."""
        given = list(zip(table.group.tolist(), table.words["answer"], table.graded.tolist(), strict=True))
        clusters = Counter((group, answer) for group, answer, graded in given if graded and answer)
        sizes = torch.bincount(table.group[table.graded], minlength=len(table.prompt_ids))[table.group]
        alike = [clusters[group, answer] if graded else 0 for group, answer, graded in given]
        share = torch.tensor(alike, dtype=torch.float64) / sizes.clamp(min=1)
        return (reward.double() - table.reward + share).float()
