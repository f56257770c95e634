"""Baselines that weigh a rollout's tokens by the ratio of the whole rollout."""

from __future__ import annotations

from torch import Tensor

from clipo_megatron.algorithms.base import TokenBatch
from clipo_megatron.algorithms.grpo import GRPO


class GSPO(GRPO):
    """arXiv 2507.18071: GRPO's advantage with s = exp(mean over the rollout's tokens of log rho) in place of each
    token's own ratio, clipped per rollout; rollouts weigh the same.

    Assumes that rollouts are short of enormous: the mean of log ratios hides single tokens far off.
    """

    def log_ratio(self, tokens: TokenBatch) -> Tensor:
        """[N] float32, the rollout's mean on each of its tokens."""
        return tokens.mean(tokens.logprobs - tokens.old_logprobs)
