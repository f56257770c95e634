"""Perception-aware policy optimisation, in its text form: what the policy would say without reading the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook, HookContext, TokenBatch
from clipo_megatron.algorithms.seeds import generator_of
from clipo_megatron.flow import RolloutTable


class PAPO(Hook):
    """arXiv 2507.06448: adds weight * KL(pi || pi_mask) to the objective, k3 on each token, so that answers depend on
    the prompt. pi_mask is the scored policy behind a prompt some of whose tokens are masked.

    The paper masks patches of an image; here it is tokens of the prompt, drawn anew in each step for each prompt. The
    log ratio is held within +-limit: the term is to be maximised and has no bound. There is no gradient through
    pi_mask. Assumes prompts whose masking does not leave the answer readable.
    """

    learns_without_advantage = True
    provides = frozenset({"masked_logprob"})
    needs = provides

    def __init__(self, *, weight: float = 0.01, mask: float = 0.6, limit: float = 10.0, seed: int = 0):
        self.weight, self.mask, self.limit, self.seed = weight, mask, limit, seed
        self.context: HookContext | None = None

    def bind(self, context: HookContext) -> None:
        """Keep the prompts."""
        self.context = context

    def variants(self, table: RolloutTable) -> dict[str, dict[int, Tensor]]:
        """Every prompt with a share `mask` of its tokens replaced."""
        masked = {}
        for group, name in enumerate(table.prompt_ids):
            tokens = self.context.prompts[name].tokens
            hidden = torch.rand(tokens.numel(), generator=generator_of(self.seed, table.step, name)) < self.mask
            masked[group] = torch.where(hidden, self.context.mask_id, tokens)
        return {"masked_logprob": masked}

    def loss(self, tokens: TokenBatch) -> Tensor:
        """[N] float32."""
        x = (tokens.signals["masked_logprob"] - tokens.logprobs).clamp(-self.limit, self.limit)
        kl = torch.expm1(x) - x
        tokens.metrics["papo/kl"] = (tokens.weights * kl.detach()).sum()
        return -self.weight * kl
