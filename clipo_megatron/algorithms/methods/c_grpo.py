"""Rewards of correct rollouts by rubrics: which of the facts that a solution should name it names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook, HookContext
from clipo_megatron.algorithms.user_classes import imported
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.flow import Prompt, Rollout, RolloutTable


class CGRPO(Hook):
    """arXiv 2601.06021 (CaRR): the reward of a correct rollout times (1 - alpha) + alpha R / max R, R its rubric score
    and the maximum that of its group; wrong rollouts keep theirs, which is 0 in the paper.

    R is the share of the row's rubrics (extra_info[rubrics], a list of texts) that are found in the response, where
    the paper has a model judge them; or what your function `score(prompt, rollout)` gives. The maximum is over all
    graded rollouts of the group; where it is 0, R / max R is 0. It is the grader's reward that shrinks: what other
    stages add to it, CLIPO's bonus too, keeps its scale. Assumes scores that are not negative.
    """

    provides = frozenset({"rubric"})

    def __init__(
        self, *, alpha: float = 0.3, rubrics: str = "rubrics", ignore_case: bool = True, score: str | None = None
    ):
        self.alpha, self.rubrics, self.ignore_case = alpha, rubrics, ignore_case
        self.score: Callable[[Prompt, Rollout], float] = self._share if score is None else imported(score)
        if not callable(self.score):
            raise ConfigError(f"{score} is no function. Name one that takes a prompt and a rollout.")

    def bind(self, context: HookContext) -> None:
        """See that every training prompt has rubrics.

        Raises:
            ConfigError: one has none.
        """
        if self.score != self._share:
            return
        for name, prompt in context.prompts.items():
            if not (texts := self._rubrics(prompt)) or not all(isinstance(each, str) and each for each in texts):
                raise ConfigError(
                    f"c_grpo: training prompt {name} has no list of texts as extra_info[{self.rubrics!r}]. Give each "
                    "row one, or name a function of yours in the option `score`."
                )

    def _rubrics(self, prompt: Prompt) -> list[str]:
        texts = prompt.extra.get(self.rubrics)
        return [] if texts is None or isinstance(texts, str) else list(texts)

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        """The rubric score."""
        return {"rubric": float(self.score(prompt, rollout))}

    def _share(self, prompt: Prompt, rollout: Rollout) -> float:
        def plain(text: str) -> str:
            return text.casefold() if self.ignore_case else text

        said, texts = plain(rollout.text), self._rubrics(prompt)
        return sum(plain(each) in said for each in texts) / len(texts)

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32."""
        score = table.signals["rubric"]
        best = torch.zeros(len(table.prompt_ids), dtype=torch.float64).scatter_reduce(
            0, table.group[table.graded], score[table.graded], "amax"
        )[table.group]
        relative = torch.where(best > 0, score / best, 0.0)
        return torch.where(table.correct, reward - self.alpha * (1 - relative) * table.reward, reward).float()
