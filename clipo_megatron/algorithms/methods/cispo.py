"""Clipped importance sampling policy optimisation: the ratio is a weight, and every token keeps its gradient."""

from __future__ import annotations

from torch import Tensor

from clipo_megatron.algorithms.hook import TokenBatch
from clipo_megatron.algorithms.methods.grpo import GRPO


class CISPO(GRPO):
    """arXiv 2506.13585: -stopgrad(clip(rho, 1 - low, 1 + high)) A log pi on each token, with GRPO's advantage.

    Unlike in PPO's surrogate a token beyond the clip goes on learning, with its weight held. low = 1 is no bound below,
    as in the paper; high = 5 lets weights reach 6 (where an implementation's bound is 5 in all, set clip_high to 4).

    Assumes rare tokens matter. CLIPO's bonus acts through the reward.
    """

    def loss(self, tokens: TokenBatch) -> Tensor:
        """[N] float32. Its value is no estimate of the objective; its gradient is."""
        ratio = (tokens.logprobs.detach() - tokens.old_logprobs).exp()
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        tokens.metrics["policy/clip_fraction"] = (tokens.weights * (weight != ratio)).sum()
        loss = -weight * tokens.advantages * tokens.logprobs
        return loss if tokens.importance is None else tokens.importance * loss
