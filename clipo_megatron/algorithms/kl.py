"""The distance to the reference policy, as a loss or as part of the reward, and the entropy bonus.

Estimators of KL(pi || pi_ref) from samples of pi: http://joschu.net/blog/kl-approx.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, ScoredTokens, Signal, TokenBatch
from clipo_megatron.config.schema import KLKind
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


# The bounds of the released code: of log ratios, and of the value of k3.
LARGEST_RELEASED_LOG_RATIO = 20.0
LARGEST_RELEASED_K3 = 10.0


def kl_estimate(kind: KLKind, logprobs: Tensor, reference: Tensor, *, clamped: bool = False) -> Tensor:
    """The estimate of KL(pi || pi_ref) at each token, [N] float32.

    With x = log pi_ref - log pi:  k1 = -x,  k2 = x^2 / 2,  k3 = exp(x) - 1 - x. With
    `clamped`, x is held within 20 and k3 within 10, beyond which there is no gradient.
    """
    x = reference - logprobs
    if clamped and kind is KLKind.k3:
        x = x.clamp(-LARGEST_RELEASED_LOG_RATIO, LARGEST_RELEASED_LOG_RATIO)
        return (torch.expm1(x) - x).clamp(max=LARGEST_RELEASED_K3)
    if kind is KLKind.k1:
        return -x
    if kind is KLKind.k2:
        return 0.5 * x.square()
    return torch.expm1(x) - x


class KLLoss(Hook):
    """Adds coefficient * KL(pi || pi_ref) to the loss of every token."""

    needs = frozenset({Signal.reference_logprobs})
    learns_without_advantage = True

    def __init__(self, coefficient: float, kind: KLKind, *, clamped: bool = False):
        self.coefficient, self.kind, self.clamped = coefficient, kind, clamped

    def loss(self, tokens: TokenBatch) -> Tensor:
        per_token = kl_estimate(self.kind, tokens.logprobs, tokens.reference_logprobs, clamped=self.clamped)
        tokens.metrics["policy/reference_kl"] = (tokens.weights * per_token.detach()).sum()
        return self.coefficient * per_token


class KLReward(Hook):
    """Subtracts coefficient * KL(pi_old || pi_ref) from the reward.

    It is summed over the response and taken from the rollout's reward, or, with `per_token`, taken from each token's
    own reward, for a base method that reads rewards of single tokens.
    """

    def __init__(self, coefficient: float, kind: KLKind, *, per_token: bool = False):
        self.coefficient, self.kind, self.per_token = coefficient, kind, per_token
        self.needs = frozenset({Signal.reference_logprobs} | (set() if per_token else {Signal.reference_kl}))

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        return reward if self.per_token else reward - self.coefficient * table.signals["kl"]

    def token_reward(self, tokens: ScoredTokens, table: RolloutTable) -> Tensor | None:
        if not self.per_token:
            return None
        return -self.coefficient * kl_estimate(self.kind, tokens.old_logprobs, tokens.reference_logprobs)


class EntropyBonus(Hook):
    """Subtracts coefficient * entropy from the loss of every token."""

    needs = frozenset({Signal.entropy})
    learns_without_advantage = True

    def __init__(self, coefficient: float):
        self.coefficient = coefficient

    def loss(self, tokens: TokenBatch) -> Tensor:
        return -self.coefficient * tokens.entropy
