"""The gradient of a policy that draws by top-p and top-k, on a policy small enough to write its expectation down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipo_megatron.algorithms.importance import importance_weights
from clipo_megatron.config.schema import CorrectionLevel
from clipo_megatron.policy.model.logprobs import token_logprobs
from clipo_megatron.rollout.local.sampling import draw

V, H, TEMPERATURE = 9, 4, 2.0


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (V, 0.7), (4, 0.8)])
def test_the_expected_gradient_is_that_of_the_truncated_policys_reward(top_k: int, top_p: float) -> None:
    """Rollouts of one token are drawn from an older policy's support S, and the policy learns from them.

    J is the expected reward of the policy within S. The expectation of the estimate is the sum over all tokens that
    can be drawn, each with its probability, which is counted here with evenly spaced numbers. With the log-probs of
    the whole vocabulary the estimate is the gradient of nothing.
    """
    generator = torch.Generator().manual_seed(0)
    state, older, reward = (torch.randn(size, generator=generator) for size in ((H,), (V, H), (V,)))
    weight = older + 0.3 * torch.randn(V, H, generator=generator)
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    logits = (older @ state).expand(count, V)
    tokens, rollout_logprobs, support = draw(logits, uniforms, temperature=TEMPERATURE, top_k=top_k, top_p=top_p)
    kept = support[0][support[0] >= 0].long()
    assert 1 < kept.numel() < V
    drawn, first = torch.unique(tokens, return_inverse=True)
    assert set(drawn.tolist()) == set(kept.tolist())
    chance = torch.bincount(first).double() / count
    places = [int((tokens == token).nonzero()[0]) for token in drawn]

    exact = weight.double().requires_grad_()
    within = (exact @ state.double() / TEMPERATURE)[kept].softmax(0)
    (within @ reward.double()[kept]).backward()

    def expected(of_support: bool) -> Tensor:
        ours = weight.clone().requires_grad_()
        states, sets = state.expand(drawn.numel(), H), support[places] if of_support else None
        logprobs, _ = token_logprobs(states, ours, drawn, temperature=TEMPERATURE, support=sets)
        at_rollout = rollout_logprobs[places]
        if not of_support:
            at_rollout = (logits[0] / TEMPERATURE).log_softmax(0)[drawn]
        ratio = importance_weights(logprobs - at_rollout, torch.arange(drawn.numel()), CorrectionLevel.token)
        (logprobs.double() @ (chance * ratio * reward[drawn])).backward()
        return ours.grad

    assert distance(expected(True), exact.grad) < 2e-3, "frequencies are counted to 1 / 20,000"
    whole = weight.double().requires_grad_()
    ((whole @ state.double() / TEMPERATURE).softmax(0) @ reward.double()).backward()
    assert min(distance(expected(False), each) for each in (exact.grad, whole.grad)) > 0.02
