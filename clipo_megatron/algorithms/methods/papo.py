"""PAPO in its text form: away from what the policy would say without reading the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, HookContext, MethodOptions, TokenBatch
from clipo_megatron.algorithms.seeds import prompt_generator, told_apart
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PapoOptions(MethodOptions):
    weight: float = within(0.01, 0)  # gamma, weight of KL(pi || pi_mask)
    mask: float = within(0.6, 1e-6, 1)  # share of the prompt's tokens that are masked
    limit: float = within(10.0, 1e-6)  # bound of the log ratio of one token, either way
    seed: int = within(0, 0)  # seed of the choice of masked tokens


class PAPO(Hook):
    """arXiv 2507.06448, perception-aware policy optimisation: adds weight * KL(pi || pi_mask) to the objective, k3 on
    each token, so that answers depend on the prompt. pi_mask is the scored policy after a prompt with masked tokens.

    The paper masks patches of an image; here tokens of the prompt are masked, drawn anew in each step for each prompt.
    The log ratio is held within +-limit, for the term is maximised and has no bound. No gradient flows through pi_mask.
    Assumes prompts that cannot be answered once masked.
    """

    source = "arXiv 2507.06448"
    summary = "away from what the policy says without the prompt"
    options_class = PapoOptions
    learns_without_advantage = True
    prompt_variants = frozenset({"masked_logprob"})
    needs = prompt_variants

    def bind(self, context: HookContext) -> None:
        self.context = context

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """Every prompt with about a share `mask` of its tokens replaced."""
        options, masked = self.options, {}
        for group, (name, own) in enumerate(zip(table.prompt_ids, told_apart(table.prompt_ids), strict=True)):
            tokens = self.context.prompts[name].tokens
            hidden = (
                torch.rand(tokens.numel(), generator=prompt_generator(options.seed, table.step, own)) < options.mask
            )
            masked[group] = torch.where(hidden, self.context.mask_id, tokens)
        return {"masked_logprob": masked}

    def loss(self, tokens: TokenBatch) -> Tensor:
        limit = self.options.limit
        x = (tokens.signals["masked_logprob"] - tokens.logprobs).clamp(-limit, limit)
        kl = torch.expm1(x) - x
        tokens.metrics["papo/kl"] = (tokens.weights * kl.detach()).sum()
        return -self.options.weight * kl
