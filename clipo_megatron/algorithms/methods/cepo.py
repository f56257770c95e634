"""CEPO: how much likelier a hint at the right answer makes each token than a hint at a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import HookContext, MethodOptions, ScoredTokens, Signal
from clipo_megatron.algorithms.schedule import Scheduled
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.ranges import within
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

ANSWER = "{answer}"
GOLD, WRONG = "cepo_gold_logprob", "cepo_wrong_logprob"


@dataclass
class CepoOptions(MethodOptions):
    mix: float = within(0.5, 0, 1)  # l, share of the advantage that follows the hints in the first step
    mix_steps: int = within(25, 1)  # steps over which l falls to 0
    clip: float = within(0.2, 1e-6)  # e, how far a hint may move an advantage's factor from 1; 0.5 in the paper's text
    hint: str = "\nHint: the answer is {answer}."  # text appended to the user's turn

    def problems(self, config: RunConfig) -> Iterator[ConfigProblem]:
        if ANSWER not in self.hint:
            yield ConfigProblem("hint", "it has no {answer} in it", "Say where the answer goes", self.hint)


class CEPO(Scheduled):
    """arXiv 2605.19436: A_t = A [(1 - l) + l clip(exp(sign(A) D_t), 1 - e, 1 + e)], D_t = log P+ - log P-.

    P+ and P- are the scored policy's probabilities of a token after the prompt with the gold answer as a hint, and
    with a wrong one: the answer of the group's first wrong rollout that gives one other than the gold answer. Groups
    without such a rollout keep A. l falls linearly from `mix` to 0 over `mix_steps` steps in which the policy learns;
    after that the two forwards are left out. The hint is appended to the last turn of the user. A is computed from the
    shaped reward, through which CLIPO's bonus acts. Assumes gold answers.
    """

    source = "arXiv 2605.19436"
    summary = "tokens that a hint at the right answer makes likelier"
    options_class = CepoOptions
    prompt_variants = frozenset({GOLD, WRONG})
    needs = frozenset({Signal.answers}) | prompt_variants

    def bind(self, context: HookContext) -> None:
        self.context = context

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """The prompts of groups with a wrong answer, with either hint."""
        gold: dict[int, Tensor] = {}
        wrong: dict[int, Tensor] = {}
        if self._share() > 0:
            for row in (table.graded & ~table.correct).nonzero().squeeze(1).tolist():
                group, answer = int(table.group[row]), table.text_columns["answer"][row]
                if group in wrong or not answer:
                    continue
                prompt = self.context.prompts[table.prompt_ids[group]]
                if answer != (right := self._gold(prompt)):
                    gold[group], wrong[group] = self._hinted(prompt, right), self._hinted(prompt, answer)
        return {GOLD: gold, WRONG: wrong}

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        if GOLD not in tokens.signals:
            return advantage
        gap = tokens.signals[GOLD] - tokens.signals[WRONG]  # 0 where both follow the prompt itself
        clip = self.options.clip
        evidence = (advantage.sign() * gap).exp().clamp(1 - clip, 1 + clip)
        return advantage * (1 + self._share() * (evidence - 1))

    def _share(self) -> float:
        return self.linear(self.options.mix, 0.0, self.options.mix_steps)

    def _gold(self, prompt: Prompt) -> str:
        """The gold answer in the form in which answers of rollouts are read; the last box of a worked solution."""
        nothing = torch.empty(0)
        for text in (prompt.ground_truth, rf"\boxed{{{prompt.ground_truth}}}"):
            if answer := self.context.answer(prompt, Rollout(nothing.long(), nothing, text, "stop", nothing.long(), 0)):
                return answer
        return prompt.ground_truth

    def _hinted(self, prompt: Prompt, answer: str) -> Tensor:
        hint = self.options.hint.replace(ANSWER, answer)
        messages = [dict(turn) for turn in prompt.messages]
        asked = next((turn for turn in reversed(messages) if turn["role"] == "user"), None)
        if asked is None:
            messages.append({"role": "user", "content": hint})
        else:
            asked["content"] += hint
        return self.context.encode(messages)
