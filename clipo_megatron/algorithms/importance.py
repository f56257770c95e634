"""Off-policy correction: importance weights between the engine's log-probs and the trainer's.

The engine computes in another precision or with other kernels, and a rollout that was begun before the last update was
partly drawn by an older policy. With x_t = log pi_old(t) - log pi_rollout(t), where pi_old is the trainer's policy that
scored the rollouts before the update:

    token       w_t = exp(x_t)
    sequence    w = exp(sum of x_t over the rollout), the same for all its tokens
    geometric   w = exp(mean of x_t over the rollout), the same for all its tokens

and, since a product of ratios has no bound,

    truncate    min(w, cap)
    mask        w where floor <= w <= cap, else 0

The weights multiply the policy gradient alone, and no gradient flows through them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, TokenBatch
from clipo_megatron.config.schema import CorrectionConfig, CorrectionKind, CorrectionLevel, RunConfig

if TYPE_CHECKING:
    from torch import Tensor

# exp(20) is 4.9e8: far beyond any cap, and far from overflow, also when squared
LARGEST_EXPONENT = 20.0
# The entries of `correction_sums`. The first two are of the limited weights, the next two count unlimited ones.
SUMS = ("weight", "square", "above_cap", "below_floor", "tokens")


def correction_of(config: RunConfig) -> CorrectionConfig:
    """The correction that acts in a run: `algorithm.correction`, with a kind where none was chosen.

    Rollouts that were generated ahead of their step are of older weights, so their weights are then truncated.
    """
    correction = config.algorithm.correction
    if correction.kind is not None:
        return correction
    return replace(correction, kind=CorrectionKind.truncate if config.rollout.ahead else CorrectionKind.none)


def importance_weights(log_ratio: Tensor, rollout: Tensor, level: CorrectionLevel) -> Tensor:
    """The unlimited weight of each token, [N] float64.

    Args:
        log_ratio: [N], log pi_old - log pi_rollout of each token of whole rollouts.
        rollout: [N] int64, number of the rollout that each token belongs to.
        level: token, sequence or geometric.
    """
    exponent = log_ratio.detach().double()
    if level is not CorrectionLevel.token and exponent.numel():
        total = exponent.new_zeros(int(rollout.max()) + 1).index_add_(0, rollout, exponent)
        if level is CorrectionLevel.geometric:
            total = total / torch.bincount(rollout).clamp(min=1)
        exponent = total[rollout]
    return exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()


def limited(weights: Tensor, config: CorrectionConfig) -> Tensor:
    """The weights [N], truncated at the cap or set to 0 outside [floor, cap]."""
    if config.kind is CorrectionKind.truncate:
        return weights.clamp(max=config.cap)
    return torch.where((weights >= config.floor) & (weights <= config.cap), weights, 0.0)


def correction_sums(log_ratio: Tensor, rollout: Tensor, config: CorrectionConfig) -> Tensor:
    """Sums over tokens in the order of SUMS, [5] float64, to be added up over micro-batches and ranks."""
    weights = importance_weights(log_ratio, rollout, config.level)
    acting = limited(weights, config)
    below = weights < config.floor if config.kind is CorrectionKind.mask else torch.zeros_like(weights)
    parts = (acting.sum(), acting.square().sum(), (weights > config.cap).sum(), below.sum())
    return torch.stack([*(part.double() for part in parts), weights.new_tensor(weights.numel())])


def correction_metrics(sums: Tensor) -> dict[str, float]:
    """Metrics of the correction in a step, from the sums over all its tokens.

    off_policy/importance_mean     mean of the limited weights; 1 on policy
    off_policy/above_cap           share of tokens whose weight is truncated, or masked because it is too large
    off_policy/below_floor         share of tokens masked because their weight is too small
    off_policy/effective_samples   (sum w)^2 / (n sum w^2): the share of the tokens that still counts; 1 on policy
    """
    weight, square, above, below, tokens = sums.tolist()
    count = max(tokens, 1.0)
    return {
        "off_policy/importance_mean": weight / count,
        "off_policy/above_cap": above / count,
        "off_policy/below_floor": below / count,
        "off_policy/effective_samples": weight**2 / (count * square) if square else 0.0,
    }


class OffPolicyCorrection(Hook):
    """Weighs the policy gradient of each token by how much likelier the trainer's policy was to draw it.

    Truncated token weights: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al., 2025.
    Masked weights: IcePop, Ling team, 2025. The geometric mean of a rollout's ratios: GSPO, arXiv 2507.18071. Assumes
    that both log-probs are of the distribution that was drawn from: at its temperature, and over what top-p and top-k
    kept.
    """

    def __init__(self, config: CorrectionConfig):
        self.config = config

    def importance(self, tokens: TokenBatch) -> Tensor:
        weights = importance_weights(tokens.old_logprobs - tokens.rollout_logprobs, tokens.rollout, self.config.level)
        return limited(weights, self.config).float()
