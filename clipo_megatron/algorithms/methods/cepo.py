"""Contrastive evidence: how much a hint at the right answer makes each token likelier than a hint at a wrong one."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import HookContext, ScoredTokens, Signal
from clipo_megatron.algorithms.schedule import Scheduled
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

ANSWER = "{answer}"
GOLD, WRONG = "cepo_gold_logprob", "cepo_wrong_logprob"


class CEPO(Scheduled):
    """arXiv 2605.19436: A_t = A [(1 - l) + l clip(exp(sign(A) D_t), 1 - e, 1 + e)], D_t = log P+ - log P-.

    P+ and P- are the scored policy's probabilities of a token behind the prompt with the gold answer as a hint, and
    with a wrong one: that of the group's first wrong rollout that gives an answer other than the gold one. Groups
    without such a rollout keep A. l falls linearly from `mix` to 0 over `mix_steps` steps in which the policy learns;
    then the two forwards are left out. `clip` is 0.2 as in the authors' script; their text says 0.5. The hint is
    appended to the last turn of the user. A is of the shaped reward, where CLIPO's bonus acts. Assumes gold answers.
    """

    credits_tokens = True
    provides = frozenset({GOLD, WRONG})
    needs = frozenset({Signal.answers}) | provides

    def __init__(
        self, *, mix: float = 0.5, mix_steps: int = 25, clip: float = 0.2, hint: str = "\nHint: the answer is {answer}."
    ):
        super().__init__()
        self.mix, self.mix_steps, self.clip, self.hint = mix, mix_steps, clip, hint
        self.context: HookContext | None = None

    def bind(self, context: HookContext) -> None:
        """Keep the prompts."""
        self.context = context

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """The prompts of groups with a wrong answer, with either hint."""
        gold: dict[int, Tensor] = {}
        wrong: dict[int, Tensor] = {}
        if self._share() > 0:
            for row in (table.graded & ~table.correct).nonzero().squeeze(1).tolist():
                group, answer = int(table.group[row]), table.words["answer"][row]
                if group in wrong or not answer:
                    continue
                prompt = self.context.prompts[table.prompt_ids[group]]
                if answer != (right := self._gold(prompt)):
                    gold[group], wrong[group] = self._hinted(prompt, right), self._hinted(prompt, answer)
        return {GOLD: gold, WRONG: wrong}

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """[N] float32."""
        if GOLD not in tokens.signals:
            return advantage
        gap = tokens.signals[GOLD] - tokens.signals[WRONG]  # 0 where both are behind the prompt itself
        evidence = (advantage.sign() * gap).exp().clamp(1 - self.clip, 1 + self.clip)
        return advantage * (1 + self._share() * (evidence - 1))

    def _share(self) -> float:
        return self.linear(self.mix, 0.0, self.mix_steps)

    def _gold(self, prompt: Prompt) -> str:
        """The gold answer as the answers of rollouts are written; a worked solution gives its last box."""
        nothing = torch.empty(0)
        for text in (prompt.ground_truth, rf"\boxed{{{prompt.ground_truth}}}"):
            if answer := self.context.answer(prompt, Rollout(nothing.long(), nothing, text, "stop", nothing.long(), 0)):
                return answer
        return prompt.ground_truth

    def _hinted(self, prompt: Prompt, answer: str) -> Tensor:
        messages = [dict(turn) for turn in prompt.messages]
        asked = next((turn for turn in reversed(messages) if turn["role"] == "user"), None)
        if asked is None:
            messages.append({"role": "user", "content": self.hint.replace(ANSWER, answer)})
        else:
            asked["content"] += self.hint.replace(ANSWER, answer)
        return self.context.encode(messages)
