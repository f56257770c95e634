"""Hybrid post-training: learn from a demonstration where a prompt is too hard to be learned from rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import HookContext, Signal
from clipo_megatron.algorithms.methods.grpo import DrGRPO
from clipo_megatron.algorithms.policy_loss import BaselineSettings
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.flow import Demonstration, Prompt, RolloutTable

SOLUTION = "solution"
BOX = r"\boxed{"


class HPT(DrGRPO):
    """arXiv 2509.04419: a group with at most `gate` correct rollouts gives way to -log pi of the demonstration of its
    prompt; other groups learn by the clipped surrogate with A = r - mean.

    Each prompt of a mini-batch has a like share of the loss: demonstrations weigh sft_weight / prompts, as means over
    their tokens, and the surrogate, aggregated over the groups that learn by it, their share of the prompts; the
    source leaves this open. pi is the policy that samples, at its temperature. A demonstration is a text of the row's
    extra_info and the end of a turn, cut at rollout.max_new_tokens: under the key `demonstration`, or, if that is None,
    under "solution", else the ground truth where that is worked out (has a box in it). Prompts without one always
    learn from rollouts. Stages that select rollouts do so among those of groups that learn by them; a group of which
    none is left has no share. CLIPO's bonus acts on r, in groups that learn from it.
    """

    needs = frozenset({Signal.demonstrations})

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        gate: int = 0,
        sft_weight: float = 1.0,
        demonstration: str | None = None,
    ):
        super().__init__(settings)
        self.gate, self.sft_weight, self.demonstration = gate, sft_weight, demonstration
        self.context: HookContext | None = None

    def bind(self, context: HookContext) -> None:
        """Look for demonstrations.

        Raises:
            ConfigError: no prompt has one.
        """
        if not any(self._text(prompt) for prompt in context.prompts.values()):
            where = (
                f"extra_info.{self.demonstration}"
                if self.demonstration
                else f"extra_info.{SOLUTION}, nor a ground truth with {BOX}...}} in it"
            )
            raise ConfigError(
                f"hpt learns from demonstrations, and none of the {len(context.prompts)} training prompts has one: no "
                f"{where}. Name the key that has them in algorithm.options.demonstration, or choose other data."
            )
        self.context = context

    def force_keep(self, table: RolloutTable) -> Tensor:
        """[B] bool, the rollouts of groups that give way: with advantages of 0 they are the first that a selection
        would drop, and their demonstrations with them."""
        return self._routed(table)[table.group]

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor:
        """[B] float32; 0 in groups that give way to their demonstration."""
        learning = rows[~self._routed(table)[table.group[rows]]]
        share = table.group[learning].unique().numel() / max(table.group[rows].unique().numel(), 1)
        return share * super().token_weight(table, learning)

    def demonstrate(self, table: RolloutTable, rows: Tensor) -> Sequence[Demonstration]:
        """Of the groups of `rows` that give way, in order."""
        routed, groups = self._routed(table), table.group[rows].unique().tolist()
        found = []
        for group in groups:
            if routed[group]:
                prompt = self.context.prompts[table.prompt_ids[group]]
                response = self._response(prompt)
                weight = self.sft_weight / (len(groups) * response.numel())
                found.append(Demonstration(group, prompt.tokens, response, weight))
        return found

    def _routed(self, table: RolloutTable) -> Tensor:
        """[groups] bool."""
        right = torch.zeros(len(table.prompt_ids), dtype=torch.int64).index_add(0, table.group, table.correct.long())
        has_one = [bool(self._text(self.context.prompts[name])) for name in table.prompt_ids]
        return (right <= self.gate) & torch.tensor(has_one)

    def _text(self, prompt: Prompt) -> str:
        text = prompt.extra.get(self.demonstration or SOLUTION)
        if not text and self.demonstration is None and BOX in prompt.ground_truth:
            text = prompt.ground_truth
        return text if isinstance(text, str) else ""

    def _response(self, prompt: Prompt) -> Tensor:
        tokens = torch.cat([self.context.tokenize(self._text(prompt)), torch.tensor([self.context.end_id])])
        return tokens[: self.context.config.rollout.max_new_tokens]
