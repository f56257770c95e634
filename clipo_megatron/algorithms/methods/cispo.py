"""CISPO: the clipped ratio is a weight, so that every token keeps its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipo_megatron.algorithms.hook import TokenBatch
from clipo_megatron.algorithms.methods.grpo import GRPO

if TYPE_CHECKING:
    from torch import Tensor


class CISPO(GRPO):
    """arXiv 2506.13585, clipped importance sampling: -stopgrad(clip(rho, 1 - low, 1 + high)) A log pi on each token,
    with GRPO's advantage.

    Unlike with PPO's loss, a token beyond the clip goes on learning, at the bound's weight. low = 1 is no bound below,
    as in the paper; high = 5 lets weights reach 6 (where another implementation bounds the weight at 5, set clip_high
    to 4). Assumes that rare tokens matter. CLIPO's bonus acts through the reward.
    """

    source = "arXiv 2506.13585"
    summary = "clipped ratios as weights, so that no token loses its gradient"
    default_clip = (1.0, 5.0)
    clip_low_below_one = False

    def loss(self, tokens: TokenBatch) -> Tensor:
        """The loss of each token, [N] float32: its gradient estimates that of the objective, its value does not."""
        ratio = (tokens.logprobs.detach() - tokens.old_logprobs).exp()
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        tokens.metrics["policy/clip_fraction"] = (tokens.weights * (weight != ratio)).sum()
        loss = -weight * tokens.advantages * tokens.logprobs
        return loss if tokens.importance is None else tokens.importance * loss
