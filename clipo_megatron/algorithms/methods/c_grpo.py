"""C-GRPO: the reward of correct rollouts depends on a rubric, the facts that a solution should name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, HookContext, MethodOptions
from clipo_megatron.algorithms.user_classes import import_object, import_path_problems
from clipo_megatron.config.errors import ConfigError, ConfigProblem
from clipo_megatron.config.ranges import within
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CgrpoOptions(MethodOptions):
    alpha: float = within(0.3, 0, 1)  # share of a correct rollout's reward that its rubric score decides
    rubrics: str = "rubrics"  # key of extra_info with a row's rubrics, a list of texts to be found in the response
    ignore_case: bool = True  # whether upper and lower case are the same in the search for rubrics
    score: Optional[str] = None  # a function of yours in place of rubrics: file.py:function, package.module:function

    def problems(self, config: RunConfig) -> Iterator[ConfigProblem]:
        if self.score is not None:
            yield from import_path_problems("score", self.score, "function")


class CGRPO(Hook):
    """arXiv 2601.06021 (CaRR): the reward of a correct rollout times (1 - alpha) + alpha R / max R, with R its rubric
    score and the maximum over its group. Wrong rollouts keep their reward, which is 0 in the paper.

    R is the share of the row's rubrics (extra_info[rubrics], a list of texts) that are found in the response, where the
    paper asks a model; or what your function `score(prompt, rollout)` returns. The maximum is over the graded rollouts
    of the group; where it is 0, so is R / max R. Only the grader's reward shrinks: what other hooks add to it, such as
    CLIPO's bonus, keeps its scale. Assumes scores that are not negative.
    """

    source = "arXiv 2601.06021"
    summary = "correct rollouts by their rubric scores"
    options_class = CgrpoOptions
    provides = frozenset({"rubric"})

    def __init__(self, options: CgrpoOptions | None = None):
        super().__init__(options)
        named = self.options.score
        self.score: Callable[[Prompt, Rollout], float] = self._share if named is None else import_object(named)
        if not callable(self.score):
            raise ConfigError(f"{named} is no function. Name one that takes a prompt and a rollout.")

    def bind(self, context: HookContext) -> None:
        """Check that every training prompt has rubrics.

        Raises:
            ConfigError: a prompt has none.
        """
        if self.options.score is not None:
            return
        for name, prompt in context.prompts.items():
            if not (texts := self._rubrics(prompt)) or not all(isinstance(each, str) and each for each in texts):
                raise ConfigError(
                    f"c_grpo: training prompt {name} has no list of texts as extra_info[{self.options.rubrics!r}]. "
                    "Give each row one, or name a function of yours in the option `score`."
                )

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        return {"rubric": float(self.score(prompt, rollout))}

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        score = table.signals["rubric"]
        best = torch.zeros(len(table.prompt_ids), dtype=torch.float64).scatter_reduce(
            0, table.group[table.graded], score[table.graded], "amax"
        )[table.group]
        relative = torch.where(best > 0, score / best, 0.0)
        return torch.where(table.correct, reward - self.options.alpha * (1 - relative) * table.reward, reward).float()

    def _rubrics(self, prompt: Prompt) -> list[str]:
        texts = prompt.extra.get(self.options.rubrics)
        return [] if texts is None or isinstance(texts, str) else list(texts)

    def _share(self, prompt: Prompt, rollout: Rollout) -> float:
        def plain(text: str) -> str:
            return text.casefold() if self.options.ignore_case else text

        response, texts = plain(rollout.text), self._rubrics(prompt)
        return sum(plain(each) in response for each in texts) / len(texts)
