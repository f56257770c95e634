"""Log ratios far beyond what float32 can exponentiate: where a token is clipped or masked its gradient is exactly 0,
and every other gradient is that of float64."""

from __future__ import annotations

import pytest
import torch

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import Hook, TokenBatch
from clipo_megatron.algorithms.methods.cispo import CISPO
from clipo_megatron.algorithms.methods.dapo import DAPO
from clipo_megatron.algorithms.methods.disco import DisCO, DiscoOptions, DiscoScore
from clipo_megatron.algorithms.methods.grpo import GRPO, DrGRPO
from clipo_megatron.algorithms.methods.gspo import GMPO, GSPO
from clipo_megatron.algorithms.methods.ppo import PPO
from clipo_megatron.algorithms.methods.reinforce import RLOO
from clipo_megatron.algorithms.policy_loss import PolicyLossSettings
from clipo_megatron.config.schema import Aggregation

METHODS = [GRPO, DrGRPO, DAPO, RLOO, PPO, GSPO, GMPO, CISPO]
# Log ratio, advantage, weight and importance of each token; every rollout has one token.
CLIPPED = [(100.0, 1.0, 0.1, 1.0), (1e4, 0.5, 0.1, 1.0), (200.0, 0.0, 0.1, 1.0)]
MASKED = [(100.0, -1.0, 0.0, 1.0), (1e4, 2.0, 0.0, 1.0), (300.0, -2.0, 0.1, 0.0)]
ORDINARY = [
    (1e-4, 1.0, 0.1, 1.0),
    (0.1, 1.0, 0.1, 1.0),
    (-0.05, -1.0, 0.1, 2.0),
    (-200.0, -1.0, 0.1, 1.0),
    (-200.0, 1.0, 0.1, 1.0),
]
LARGE_BUT_FINITE = [(30.0, 1.0, 0.1, 1.0), (30.0, -1.0, 0.1, 1.0)]


class Importance(Hook):
    """Importance weights as an off-policy correction gives them."""

    def __init__(self, factors: torch.Tensor):
        super().__init__()
        self.factors = factors

    def importance(self, tokens: TokenBatch) -> torch.Tensor:
        return self.factors


def batch_of(facts: list[tuple[float, ...]], dtype: torch.dtype) -> TokenBatch:
    ratios, advantages, weights, _ = (torch.tensor(column, dtype=dtype) for column in zip(*facts, strict=True))
    old = torch.full_like(ratios, -1.0)
    return TokenBatch(
        logprobs=(old + ratios).requires_grad_(),
        old_logprobs=old,
        advantages=advantages,
        weights=weights,
        rollout=torch.arange(len(facts)),
        rollout_logprobs=old,
        rows=torch.arange(len(facts)),
    )


def gradient(kind: type, facts: list[tuple[float, ...]], dtype: torch.dtype) -> torch.Tensor:
    base = kind(PolicyLossSettings(*kind.default_clip, Aggregation.token_mean, 9))
    factors = torch.tensor([each[3] for each in facts], dtype=dtype)
    tokens = batch_of(facts, dtype)
    total, value = Algorithm([base, Importance(factors)]).objective(tokens)
    assert torch.isfinite(value)
    total.backward()
    assert all(torch.isfinite(metric) for metric in tokens.metrics.values())
    return tokens.logprobs.grad


@pytest.mark.parametrize("kind", METHODS)
def test_gradients_are_those_of_float64(kind: type) -> None:
    facts = [*ORDINARY, *LARGE_BUT_FINITE, *MASKED, *CLIPPED]
    ours, exact = gradient(kind, facts, torch.float32), gradient(kind, facts, torch.float64)
    assert torch.isfinite(exact).all() and torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-38)
    masked = ours[len(ORDINARY) + len(LARGE_BUT_FINITE) :][: len(MASKED)]
    assert not masked.any()
    if kind is not CISPO:  # which learns from clipped tokens too, at the bound's weight
        assert not ours[-len(CLIPPED) :].any()
    assert ours[: len(ORDINARY)].any()


@pytest.mark.parametrize("kind", METHODS)
def test_ordinary_gradients_do_not_change(kind: type) -> None:
    """Far-off neighbours leave the others' gradients as they are, to the bit."""
    together = gradient(kind, [*ORDINARY, *MASKED, *CLIPPED], torch.float32)[: len(ORDINARY)]
    assert torch.equal(together, gradient(kind, ORDINARY, torch.float32))


def test_rollouts_without_a_part_in_a_group_loss_have_no_gradient() -> None:
    base = DisCO(
        PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 9), DiscoOptions(score=DiscoScore.likelihood_ratio)
    )
    tokens = batch_of([(0.1, 0.0, 0.1, 1.0), (100.0, 0.0, 0.1, 1.0)], torch.float32)
    tokens.score_gradient = torch.tensor([[0.5, 0.1], [0.0, 0.1]])
    total, _ = Algorithm([base]).objective(tokens)
    total.backward()
    assert torch.isfinite(total) and torch.allclose(
        tokens.logprobs.grad, torch.tensor([0.5 * torch.e**0.1 - 0.1, -0.1])
    )


def test_tokens_of_a_rollout_with_advantages_of_their_own() -> None:
    """GMPO's mean ratio is large because of one token; a clipped token of the same rollout still has no gradient."""
    base = GMPO(PolicyLossSettings(*GMPO.default_clip, Aggregation.token_mean, 9))
    for dtype in (torch.float32, torch.float64):
        tokens = batch_of([(300.0, -1.0, 0.1, 1.0), (300.0, 1.0, 0.1, 1.0), (300.0, 0.0, 0.1, 1.0)], dtype)
        tokens.rollout = torch.zeros(3, dtype=torch.int64)
        (tokens.weights * base.loss(tokens)).sum().backward()
        assert tokens.logprobs.grad[1:].tolist() == [0.0, 0.0] and tokens.logprobs.grad[0] > 1e30
