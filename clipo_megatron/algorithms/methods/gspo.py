"""GSPO and GMPO: a rollout's tokens weigh by the ratio of the whole rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import TokenBatch
from clipo_megatron.algorithms.methods.grpo import GRPO
from clipo_megatron.algorithms.policy_loss import exp_where_it_acts, without_importance
from clipo_megatron.config.schema import Aggregation

if TYPE_CHECKING:
    from torch import Tensor


class GSPO(GRPO):
    """arXiv 2507.18071: GRPO's advantage with s = exp(mean over the rollout's tokens of log rho) in place of each
    token's own ratio, clipped for the whole rollout; every rollout weighs the same.

    Tokens with advantages or importance weights of their own learn by their own, and all are clipped by the rollout's
    s: the paper's GSPO-token. Where the tokens of a rollout have the same, that is GSPO.

    Assumes responses that are not very long: the mean of the log ratios hides single tokens that are far off.
    """

    source = "arXiv 2507.18071"
    summary = "one ratio a rollout, clipped as a whole"
    default_clip = (3e-4, 4e-4)
    default_aggregation = Aggregation.sequence_mean

    def log_ratio(self, tokens: TokenBatch) -> Tensor:
        """The rollout's mean log ratio on each of its tokens, with the token's own gradient; [N] float32."""
        return mean_with_own_gradient(tokens.logprobs - tokens.old_logprobs, tokens)


class GMPO(GRPO):
    """arXiv 2507.20673: -A times the geometric mean over a rollout's tokens of their clipped ratios, with GRPO's
    advantage; every rollout weighs the same.

    log rho is clipped on the side to which the advantage pushes: at most high where A > 0, at least -low where A < 0,
    with low = high = 0.4. On the other side it is free, as the maximum in PPO's loss leaves it.

    Tokens with advantages or importance weights of their own learn by their own; each log rho is then clipped by the
    sign of its own token's advantage, and the mean is over all of them. CLIPO's bonus acts through the reward.
    """

    source = "arXiv 2507.20673"
    summary = "geometric mean of a rollout's ratios, log clipped on one side"
    default_clip = (0.4, 0.4)
    clip_low_below_one = False
    default_aggregation = Aggregation.sequence_mean

    def loss(self, tokens: TokenBatch) -> Tensor:
        """The rollout's loss on each of its tokens, [N] float32."""
        log_ratio, positive = tokens.logprobs - tokens.old_logprobs, tokens.advantages > 0
        limited = torch.where(positive, log_ratio.clamp(max=self.clip_high), log_ratio.clamp(min=-self.clip_low))
        tokens.metrics["policy/clip_fraction"] = (tokens.weights * (limited != log_ratio)).sum().detach()
        idle = (limited != log_ratio) | (tokens.advantages == 0) | without_importance(tokens)
        mean_ratio = exp_where_it_acts(mean_with_own_gradient(limited, tokens), idle=idle)
        loss = -mean_ratio * tokens.advantages
        return loss if tokens.importance is None else tokens.importance * loss


def mean_with_own_gradient(values: Tensor, tokens: TokenBatch) -> Tensor:
    """The mean of each rollout's `values` [N] on each of its tokens, with the derivative 1 by the token's own value.

    The derivative of the mean itself would spread the advantage of one token over the whole rollout: a sum over tokens
    of A_t mean(x) has the gradient mean(A) for every x_t. Both sums have the same gradient where A is the same.
    """
    return tokens.mean(values.detach()) + (values - values.detach())
