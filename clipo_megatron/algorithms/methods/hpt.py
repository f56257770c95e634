"""HPT: learn from a demonstration where a prompt is too hard to be learned from rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import HookContext, MethodOptions, Signal
from clipo_megatron.algorithms.methods.grpo import DrGRPO
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.ranges import within
from clipo_megatron.config.schema import Aggregation
from clipo_megatron.flow import Demonstration, Prompt, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

SOLUTION = "solution"
BOX = r"\boxed{"


@dataclass
class HptOptions(MethodOptions):
    gate: int = within(0, 0)  # correct rollouts of a group up to which it learns from its prompt's demonstration
    sft_weight: float = within(1.0, 0)  # weight of a demonstration, against 1 for a prompt's rollouts
    demonstration: Optional[str] = None  # key of extra_info; null: "solution", else a ground truth that is worked out


class HPT(DrGRPO):
    """arXiv 2509.04419, hybrid post-training: a group with at most `gate` correct rollouts learns -log pi of its
    prompt's demonstration instead; other groups learn by the clipped loss with A = r - mean.

    Every prompt of a mini-batch has the same share of the loss: a demonstration weighs sft_weight / prompts, as a mean
    over its tokens, and the clipped loss, aggregated over the groups that learn by it, weighs their share of the
    prompts; the source leaves this open. pi is the policy that samples, at its temperature. A demonstration is a text
    of the row's extra_info and the end of a turn, cut at rollout.max_new_tokens. It stands under the key
    `demonstration`, or, if that is None, under "solution", else it is the ground truth where that is worked out (has a
    box in it). Prompts without one always learn from rollouts. Hooks that select rollouts do so among those of groups
    that learn by them; a group of which none is left has no share. CLIPO's bonus acts on r, in groups that learn from
    it.
    """

    source = "arXiv 2509.04419"
    summary = "a demonstration in place of the rollouts where none is right"
    options_class = HptOptions
    default_aggregation = Aggregation.token_mean
    needs = frozenset({Signal.demonstrations})

    def bind(self, context: HookContext) -> None:
        """Look for demonstrations.

        Raises:
            ConfigError: no prompt has one.
        """
        if not any(self._text(prompt) for prompt in context.prompts.values()):
            key = self.options.demonstration
            where = f"extra_info.{key}" if key else f"extra_info.{SOLUTION}, nor a ground truth with {BOX}...}} in it"
            raise ConfigError(
                f"hpt learns from demonstrations, and none of the {len(context.prompts)} training prompts has one: no "
                f"{where}. Name the key that has them in algorithm.options.demonstration, or choose other data."
            )
        self.context = context

    def demonstrate(self, table: RolloutTable) -> dict[int, Demonstration]:
        found = {}
        for group in self._demonstrated(table).nonzero().squeeze(1).tolist():
            prompt = self.context.prompts[table.prompt_ids[group]]
            found[group] = Demonstration(group, prompt.tokens, self._response(prompt), self.options.sft_weight)
        return found

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor:
        """The base method's token weights, [B] float32; 0 in groups that learn from their demonstration."""
        learning = rows[~self._demonstrated(table)[table.group[rows]]]
        share = table.group[learning].unique().numel() / max(table.group[rows].unique().numel(), 1)
        return share * super().token_weight(table, learning)

    def _demonstrated(self, table: RolloutTable) -> Tensor:
        """The groups that learn from their demonstration, [groups] bool."""
        right = torch.zeros(len(table.prompt_ids), dtype=torch.int64).index_add(0, table.group, table.correct.long())
        has_one = [bool(self._text(self.context.prompts[name])) for name in table.prompt_ids]
        return (right <= self.options.gate) & torch.tensor(has_one)

    def _text(self, prompt: Prompt) -> str:
        key = self.options.demonstration
        text = prompt.extra.get(key or SOLUTION)
        if not text and key is None and BOX in prompt.ground_truth:
            text = prompt.ground_truth
        return text if isinstance(text, str) else ""

    def _response(self, prompt: Prompt) -> Tensor:
        tokens = torch.cat([self.context.tokenize(self._text(prompt)), torch.tensor([self.context.end_id])])
        return tokens[: self.context.config.rollout.max_new_tokens]
