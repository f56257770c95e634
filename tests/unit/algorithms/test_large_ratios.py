"""Log ratios far beyond what float32 can exponentiate: where a token is clipped or masked its gradient is exactly 0,
and every other gradient is that of float64."""

from __future__ import annotations

import math

import pytest
import torch

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import Hook, TokenBatch
from clipo_megatron.algorithms.kl import KLLoss, kl_estimate
from clipo_megatron.algorithms.methods.cispo import CISPO
from clipo_megatron.algorithms.methods.dapo import DAPO
from clipo_megatron.algorithms.methods.disco import DisCO, DiscoOptions, DiscoScore
from clipo_megatron.algorithms.methods.grpo import GRPO, DrGRPO
from clipo_megatron.algorithms.methods.gspo import GMPO, GSPO
from clipo_megatron.algorithms.methods.ppo import PPO
from clipo_megatron.algorithms.methods.reinforce import RLOO
from clipo_megatron.algorithms.policy_loss import PolicyLossSettings
from clipo_megatron.checks.methods import method_problems
from clipo_megatron.config.schema import Aggregation, KLKind, RunConfig

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


RELEASED = PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 9, dual_clip=3.0)


def test_the_dual_clip_is_flat_above_its_bound_whatever_the_ratio() -> None:
    """Values against the formula; without it a ratio above e^88 with a negative advantage has an infinite loss."""
    ratios = [-0.5, 0.0, 0.5, 1.0, 1.2, 50.0, 89.0, 1e4]
    for advantage in (-2.0, 0.5):
        tokens = batch_of([(ratio, advantage, 0.1, 1.0) for ratio in ratios], torch.float32)
        loss = GRPO(RELEASED).loss(tokens)
        for found, x in zip(loss.tolist(), ratios, strict=True):
            ratio = math.exp(min(x, 600.0))
            value = max(-ratio * advantage, -min(max(ratio, 0.8), 1.2) * advantage)
            assert found == pytest.approx(min(value, -3 * advantage) if advantage < 0 else value, rel=1e-5)
        loss.sum().backward()
        flat = tokens.logprobs.grad[[i for i, x in enumerate(ratios) if x > math.log(3)]]
        assert tokens.logprobs.grad.isfinite().all() and not flat.any() and tokens.logprobs.grad.any()
        share = tokens.metrics["policy/dual_clip_fraction"]
        assert float(share) == pytest.approx(0.4 if advantage < 0 else 0.0)
    plain = GRPO(PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 9))
    assert plain.loss(batch_of([(1e4, -1.0, 0.1, 1.0)], torch.float32)).isinf().all()


def test_the_released_clamps() -> None:
    settings = PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 9, log_ratio_limit=20.0)
    tokens = batch_of([(1e4, -1.0, 0.1, 1.0), (25.0, -1.0, 0.1, 1.0), (0.1, -1.0, 0.1, 1.0)], torch.float32)
    loss = GRPO(settings).loss(tokens)
    assert loss.tolist() == pytest.approx([math.exp(20), math.exp(20), math.exp(0.1)], rel=1e-6)
    loss.sum().backward()
    assert tokens.logprobs.grad.tolist() == pytest.approx([0.0, 0.0, math.exp(0.1)], rel=1e-6)

    logprobs = torch.tensor([-500.0, -5.0, -1.5, -1.0, 30.0], requires_grad=True)
    reference = torch.full((5,), -1.0)
    found = kl_estimate(KLKind.k3, logprobs, reference, clamped=True)
    assert found.tolist() == pytest.approx([10.0, 10.0, math.exp(0.5) - 1.5, 0.0, 10.0], rel=1e-5)
    found.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 1 - math.exp(0.5), 0.0, 0.0], rel=1e-5)
    assert kl_estimate(KLKind.k3, logprobs[:1], reference[:1]).isinf()


def test_the_settings_reach_the_losses_and_are_refused_where_nothing_reads_them() -> None:
    config = RunConfig()
    config.algorithm.dual_clip, config.algorithm.released_clamps = 3.0, True
    config.algorithm.kl.coefficient = 0.1
    algorithm = build_algorithm(config)
    assert (algorithm.base_method.dual_clip, algorithm.base_method.log_ratio_limit) == (3.0, 20.0)
    assert [hook.clamped for hook in algorithm.hooks if isinstance(hook, KLLoss)] == [True]
    assert list(method_problems(config)) == []
    for name in ("gmpo", "cispo", "disco"):
        config.algorithm.name = name
        keys = [problem.key for problem in method_problems(config)]
        assert keys == ["algorithm.dual_clip", "algorithm.released_clamps"]
