"""Importance weights against double loops in float64, and what they multiply."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import TokenBatch
from clipo_megatron.algorithms.importance import (
    OffPolicyCorrection,
    correction_metrics,
    correction_of,
    correction_sums,
    importance_weights,
    limited,
)
from clipo_megatron.config.schema import CorrectionConfig, CorrectionKind, CorrectionLevel, KLConfig, RunConfig

LENGTHS = [1, 7, 3, 12, 1, 5]
KINDS = [CorrectionKind.truncate, CorrectionKind.mask]
CASES = list(itertools.product(KINDS, CorrectionLevel, [(2.0, 0.0), (1.1, 0.9), (5.0, 0.5)]))


def batch(spread: float = 0.5) -> TokenBatch:
    """Made-up rollouts of LENGTHS."""
    count = sum(LENGTHS)
    rollout_logprobs = -3 * torch.rand(count)
    old = rollout_logprobs + spread * torch.randn(count)
    return TokenBatch(
        logprobs=(old + 0.3 * torch.randn(count)).requires_grad_(),
        old_logprobs=old,
        advantages=torch.randn(count),
        weights=torch.rand(count),
        rollout=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        rollout_logprobs=rollout_logprobs,
        reference_logprobs=old + 0.1 * torch.randn(count),
        entropy=torch.rand(count, requires_grad=True),
    )


def by_hand(tokens: TokenBatch, config: CorrectionConfig) -> tuple[list[float], list[float]]:
    """Weights before and after the limits, one rollout and one token at a time."""
    old, engine = tokens.old_logprobs.double().tolist(), tokens.rollout_logprobs.double().tolist()
    raw, start = [], 0
    for length in LENGTHS:
        ratios = [math.exp(old[i]) / math.exp(engine[i]) for i in range(start, start + length)]
        product = math.prod(ratios)
        for ratio in ratios:
            if config.level is CorrectionLevel.token:
                raw.append(ratio)
            elif config.level is CorrectionLevel.sequence:
                raw.append(product)
            else:
                raw.append(product ** (1 / length))
        start += length
    if config.kind is CorrectionKind.truncate:
        return raw, [config.cap if each > config.cap else each for each in raw]
    return raw, [each if config.floor <= each <= config.cap else 0.0 for each in raw]


def agree(ours: Tensor, theirs: list[float]) -> None:
    torch.testing.assert_close(ours.double(), torch.tensor(theirs, dtype=torch.float64), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize(("kind", "level", "limits"), CASES, ids=lambda each: getattr(each, "value", str(each)))
def test_weights_of_every_kind_and_level(kind, level, limits):
    config = CorrectionConfig(kind, level, *limits)
    tokens = batch(spread=2.0)
    raw, acting = by_hand(tokens, config)
    agree(importance_weights(tokens.old_logprobs - tokens.rollout_logprobs, tokens.rollout, level), raw)
    ours = OffPolicyCorrection(config).importance(tokens)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    agree(ours, acting)
    assert raw != acting, "the limits are not to be seen"

    sums = correction_sums(tokens.old_logprobs - tokens.rollout_logprobs, tokens.rollout, config)
    metrics, n = correction_metrics(sums), len(raw)
    assert metrics["off_policy/importance_mean"] == pytest.approx(sum(acting) / n, rel=2e-6)
    assert metrics["off_policy/above_cap"] == sum(each > config.cap for each in raw) / n
    below = sum(each < config.floor for each in raw) / n if kind is CorrectionKind.mask else 0.0
    assert metrics["off_policy/below_floor"] == below
    effective = sum(acting) ** 2 / (n * sum(each**2 for each in acting)) if any(acting) else 0.0
    assert metrics["off_policy/effective_samples"] == pytest.approx(effective, rel=1e-5)


@pytest.mark.parametrize("level", CorrectionLevel)
@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_nothing_changes(kind, level):
    tokens = batch(spread=0.0)
    config = CorrectionConfig(kind, level)
    assert OffPolicyCorrection(config).importance(tokens).eq(1).all()
    metrics = correction_metrics(correction_sums(torch.zeros(sum(LENGTHS)), tokens.rollout, config))
    assert metrics == {
        "off_policy/importance_mean": 1.0,
        "off_policy/above_cap": 0.0,
        "off_policy/below_floor": 0.0,
        "off_policy/effective_samples": 1.0,
    }


@pytest.mark.parametrize("level", CorrectionLevel)
def test_far_off_policy_nothing_overflows(level):
    log_ratio = torch.tensor([1e4, -1e4, 300.0, -300.0, 700.0])
    weights = importance_weights(log_ratio, torch.tensor([0, 1, 2, 3, 2]), level)
    assert weights.isfinite().all() and weights.square().isfinite().all()
    for kind in KINDS:
        acting = limited(weights, CorrectionConfig(kind, level, 2.0, 0.5))
        assert acting.max() <= 2.0
    sums = correction_sums(log_ratio, torch.tensor([0, 1, 2, 3, 2]), CorrectionConfig(KINDS[1], level, 2.0, 0.5))
    assert correction_metrics(sums)["off_policy/effective_samples"] == 0.0, "all masked, and no division by zero"


def test_no_tokens():
    nothing = torch.empty(0)
    for level in CorrectionLevel:
        assert importance_weights(nothing, nothing.long(), level).numel() == 0
        sums = correction_sums(nothing, nothing.long(), CorrectionConfig(KINDS[0], level))
        assert sums.tolist() == [0.0] * 5
        assert correction_metrics(sums)["off_policy/importance_mean"] == 0.0


def config_of(kind: CorrectionKind, *, kl: float, entropy: float) -> RunConfig:
    config = RunConfig()
    config.clipo.enabled = False
    config.algorithm.correction = CorrectionConfig(kind, CorrectionLevel.geometric, 1.2, 0.8)
    config.algorithm.kl = KLConfig(coefficient=kl)
    config.algorithm.entropy_coefficient = entropy
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_policy_gradient_is_weighed(kind):
    tokens = batch()
    weights = OffPolicyCorrection(config_of(kind, kl=0, entropy=0).algorithm.correction).importance(tokens)

    def loss(kind: CorrectionKind, kl: float, entropy: float) -> tuple[Tensor, Tensor]:
        value = build_algorithm(config_of(kind, kl=kl, entropy=entropy)).loss(tokens)
        return value.detach(), torch.autograd.grad(value.sum(), tokens.logprobs)[0]

    plain, plain_gradient = loss(CorrectionKind.none, 0, 0)
    full, full_gradient = loss(CorrectionKind.none, 0.5, 0.25)
    ours, gradient = loss(kind, 0.5, 0.25)
    torch.testing.assert_close(ours, full - plain + weights * plain)
    torch.testing.assert_close(gradient, full_gradient - plain_gradient + weights * plain_gradient)
    assert not torch.allclose(ours, full)


@pytest.mark.parametrize(
    ("ahead", "said", "acts"),
    [
        (0, None, CorrectionKind.none),
        (0, CorrectionKind.mask, CorrectionKind.mask),
        (1, None, CorrectionKind.truncate),
        (3, CorrectionKind.none, CorrectionKind.none),
    ],
)
def test_rollouts_ahead_of_their_step_are_corrected_unless_the_user_says_none(ahead, said, acts):
    config = RunConfig()
    config.clipo.enabled, config.rollout.ahead, config.algorithm.correction.kind = False, ahead, said
    assert correction_of(config).kind is acts and config.algorithm.correction.kind is said
    hooks = [hook for hook in build_algorithm(config).hooks if isinstance(hook, OffPolicyCorrection)]
    assert [hook.config for hook in hooks] == (
        [] if acts is CorrectionKind.none else [CorrectionConfig(acts, CorrectionLevel.token, 2.0, 0.0)]
    )


def test_a_correction_is_built_when_asked_for():
    kinds = {kind: build_algorithm(config_of(kind, kl=0, entropy=0)).hooks for kind in CorrectionKind}
    assert {kind: len(hooks) for kind, hooks in kinds.items()} == {
        CorrectionKind.none: 1,
        CorrectionKind.truncate: 2,
        CorrectionKind.mask: 2,
    }
