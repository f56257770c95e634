"""GRPO, Dr.GRPO, their weights, clips, KL terms and entropy against formulas written out in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import Hook, Signal, TokenBatch
from clipo_megatron.algorithms.kl import EntropyBonus, KLLoss, KLReward, kl_estimate
from clipo_megatron.algorithms.methods.grpo import GRPO, DrGRPO
from clipo_megatron.algorithms.policy_loss import PolicyLossSettings
from clipo_megatron.config.schema import Aggregation, KLKind, KLPlace, RunConfig
from clipo_megatron.flow import RolloutTable


def table_of(groups: list[list[float | None]], lengths: list[int] | None = None) -> RolloutTable:
    """A table with these rewards, group by group; None is ungraded."""
    rewards = [reward for group in groups for reward in group]
    graded = torch.tensor([reward is not None for reward in rewards])
    return RolloutTable(
        prompt_ids=[f"prompt {index}" for index in range(len(groups))],
        group=torch.tensor([index for index, group in enumerate(groups) for _ in group]),
        correct=torch.tensor([bool(reward) for reward in rewards]),
        graded=graded,
        reward=torch.tensor([reward or 0.0 for reward in rewards]),
        prompt_length=torch.ones(len(rewards), dtype=torch.int64),
        response_length=torch.tensor(lengths or [3] * len(rewards)),
        truncated=torch.zeros(len(rewards), dtype=torch.bool),
        version=torch.zeros(len(rewards), dtype=torch.int64),
    )


GROUPS: dict[str, list[float | None]] = {
    "mixed": [1.0, 0.0, 0.0, 1.0, 1.0],
    "all right": [1.0, 1.0, 1.0],
    "all wrong": [0.0, 0.0, 0.0, 0.0],
    "one right": [0.0, 0.0, 1.0, 0.0],
    "all the same, no exact float": [0.1, 0.1, 0.1],
    "one rollout": [1.0],
    "one graded": [None, 1.0, None],
    "some ungraded": [1.0, None, 0.0, 0.0, None],
    "none graded": [None, None],
    "shaped": [1.13, -0.5, 0.91, 0.0],
}


def grpo_by_hand(group: list[float | None], *, divide: bool) -> list[float]:
    """(r - mean) / (unbiased std + 1e-6) of the graded ones, or r - mean."""
    graded = [reward for reward in group if reward is not None]
    if len(graded) < 2:
        return [0.0] * len(group)
    mean = statistics.fmean(graded)
    scale = statistics.stdev(graded) + 1e-6 if divide else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in group]


@pytest.mark.parametrize(("hook", "divide"), [(GRPO, True), (DrGRPO, False)])
@pytest.mark.parametrize("names", [*([name] for name in GROUPS), list(GROUPS)], ids=lambda names: "+".join(names)[:30])
def test_advantages(hook: type[GRPO] | type[DrGRPO], divide: bool, names: list[str]) -> None:
    groups = [GROUPS[name] for name in names]
    table = table_of(groups)
    ours = hook(PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 1)).advantage(table, table.reward)
    expected = [value for group in groups for value in grpo_by_hand(group, divide=divide)]
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert not ours[~table.graded].any()


def test_equal_rewards_have_no_advantage_at_all() -> None:
    """Their rounding noise, divided by a deviation of nearly zero, would be a large advantage."""
    table = table_of([[0.1] * 7, [1.0 / 3] * 3])
    assert not GRPO(PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 1)).advantage(table, table.reward).any()


def test_rewards_of_ungraded_rollouts_do_not_matter() -> None:
    table = table_of([[1.0, None, 0.0]])
    other = table.reward.clone()
    other[1] = 1e6
    hook = GRPO(PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 1))
    assert torch.equal(hook.advantage(table, table.reward), hook.advantage(table, other))


# --- weights -----------------------------------------------------------------------------------------------------

LENGTHS = [2, 5, 1, 7, 3, 4]
ROWS = [0, 2, 3, 5]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (Aggregation.token_mean, {row: 1 / (2 + 1 + 7 + 4) for row in ROWS}),
        (Aggregation.sequence_mean, {0: 1 / (4 * 2), 2: 1 / (4 * 1), 3: 1 / (4 * 7), 5: 1 / (4 * 4)}),
        (Aggregation.constant, {row: 1 / (4 * 9) for row in ROWS}),
    ],
)
def test_weights_over_the_whole_mini_batch(aggregation: Aggregation, expected: dict[int, float]) -> None:
    table = table_of([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], LENGTHS)
    weight = GRPO(PolicyLossSettings(0.2, 0.2, aggregation, 9)).token_weight(table, torch.tensor(ROWS))
    assert weight.tolist() == pytest.approx([expected.get(row, 0.0) for row in range(6)], rel=1e-6)
    if aggregation is not Aggregation.constant:
        assert float((weight * table.response_length).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_mini_batch_without_rollouts_has_no_weight(aggregation: Aggregation) -> None:
    table = table_of([[None, None]])
    weight = GRPO(PolicyLossSettings(0.2, 0.2, aggregation, 9)).token_weight(table, torch.empty(0, dtype=torch.int64))
    assert weight.tolist() == [0.0, 0.0]


# --- losses ------------------------------------------------------------------------------------------------------


def tokens_at(ratios: list[float], advantages: list[float], **more: Tensor) -> TokenBatch:
    count = len(ratios)
    old = torch.linspace(-3, -0.1, count)
    return TokenBatch(
        logprobs=(old + torch.tensor(ratios).log()).requires_grad_(),
        old_logprobs=old,
        advantages=torch.tensor(advantages),
        weights=torch.full((count,), 1 / count),
        rollout=torch.zeros(count, dtype=torch.int64),
        rollout_logprobs=old,
        **more,
    )


RATIOS = [0.5, 0.85, 1.0, 1.15, 1.25, 1.4, 3.0]


@pytest.mark.parametrize("hook", [GRPO, DrGRPO])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.1, 0.3)])
@pytest.mark.parametrize("advantage", [1.7, -0.6, 0.0])
def test_the_clipped_surrogate(hook: type[GRPO] | type[DrGRPO], low: float, high: float, advantage: float) -> None:
    tokens = tokens_at(RATIOS, [advantage] * len(RATIOS))
    losses = hook(PolicyLossSettings(low, high, Aggregation.token_mean, 1)).loss(tokens)
    losses.sum().backward()
    clipped = 0
    for ratio, loss, slope in zip(RATIOS, losses.tolist(), tokens.logprobs.grad.tolist(), strict=True):
        limited = min(max(ratio, 1 - low), 1 + high)
        assert loss == pytest.approx(-min(ratio * advantage, limited * advantage), rel=1e-5)
        # Beyond the clip in the direction that the advantage pushes to, nothing pulls any more.
        outside = (ratio > 1 + high and advantage > 0) or (ratio < 1 - low and advantage < 0)
        clipped += outside
        assert slope == pytest.approx(0.0 if outside else -ratio * advantage, rel=1e-5)
    assert float(tokens.metrics["policy/clip_fraction"]) == pytest.approx(clipped / len(RATIOS))


POLICY = [-0.1, -2.0, -5.0, -1.0]
REFERENCE = [-0.3, -1.0, -5.0, -6.0]


def kl_by_hand(kind: KLKind, policy: float, reference: float) -> tuple[float, float]:
    """Estimate and its derivative by log pi."""
    x = reference - policy
    if kind is KLKind.k1:
        return -x, 1.0
    if kind is KLKind.k2:
        return x * x / 2, -x
    return math.exp(x) - 1 - x, 1 - math.exp(x)


@pytest.mark.parametrize("kind", list(KLKind))
def test_kl_in_the_loss(kind: KLKind) -> None:
    tokens = tokens_at([1.0] * 4, [0.0] * 4, reference_logprobs=torch.tensor(REFERENCE))
    tokens.logprobs = torch.tensor(POLICY, requires_grad=True)
    losses = KLLoss(0.3, kind).loss(tokens)
    losses.sum().backward()
    expected = [kl_by_hand(kind, *pair) for pair in zip(POLICY, REFERENCE, strict=True)]
    assert losses.tolist() == pytest.approx([0.3 * value for value, _ in expected], rel=1e-5)
    assert tokens.logprobs.grad.tolist() == pytest.approx([0.3 * slope for _, slope in expected], rel=1e-5)
    reported = float(tokens.metrics["policy/reference_kl"])
    assert reported == pytest.approx(statistics.fmean(value for value, _ in expected), rel=1e-5)


def test_the_estimators_agree_on_average() -> None:
    """Samples of pi: k1 and k3 estimate KL(pi || pi_ref) without bias, k2 to second order."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(9, generator=generator).double().log_softmax(0)
    reference = (policy + 0.1 * torch.randn(9, generator=generator)).log_softmax(0)
    kl = float((policy.exp() * (policy - reference)).sum())
    for kind in KLKind:
        mean = float((policy.exp() * kl_estimate(kind, policy, reference)).sum())
        assert mean == pytest.approx(kl, rel=0.1 if kind is KLKind.k2 else 1e-9)


def test_k3_keeps_small_distances() -> None:
    """exp(x) - 1 - x in float32 would give 0 or noise here."""
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.0 + 2.0**-10])
    assert float(kl_estimate(KLKind.k3, policy, reference)) == pytest.approx(2.0**-21, rel=1e-2)


def test_kl_in_the_reward() -> None:
    table = table_of([[1.0, 0.0]])
    table.signals["kl"] = torch.tensor([0.5, 2.0])
    assert KLReward(0.1, KLKind.k1).shape_reward(table, table.reward).tolist() == pytest.approx([0.95, -0.2])


def test_the_entropy_bonus() -> None:
    entropy = torch.tensor([0.5, 2.0], requires_grad=True)
    losses = EntropyBonus(0.01).loss(tokens_at([1.0, 1.0], [0.0, 0.0], entropy=entropy))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-0.005, -0.02])
    assert entropy.grad.tolist() == pytest.approx([-0.01, -0.01])


# --- algorithms as lists of hooks -------------------------------------------------------------------------------


def built(**settings: object) -> Algorithm:
    config = RunConfig()
    for name, value in settings.items():
        target: object = config
        *parents, last = name.split("__")
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return build_algorithm(config)


def test_what_a_configuration_is_made_of() -> None:
    plain = built(clipo__enabled=False)
    assert [type(hook) for hook in plain.hooks] == [GRPO] and plain.needs == frozenset()
    assert plain.hooks[0].aggregation is Aggregation.token_mean and not plain.learns_without_advantage
    unbiased = built(clipo__enabled=False, algorithm__name="dr_grpo", rollout__max_new_tokens=77)
    assert isinstance(unbiased.hooks[0], DrGRPO)
    assert (unbiased.hooks[0].aggregation, unbiased.hooks[0].constant_length) == (Aggregation.constant, 77)
    chosen = built(algorithm__name="dr_grpo", algorithm__aggregation=Aggregation.token_mean)
    assert chosen.hooks[0].aggregation is Aggregation.token_mean
    full = built(algorithm__kl__coefficient=0.1, algorithm__entropy_coefficient=0.1)
    assert full.needs == {Signal.reference_logprobs, Signal.entropy, Signal.contrastive}
    assert full.learns_without_advantage
    in_reward = built(algorithm__kl__coefficient=0.1, algorithm__kl__place=KLPlace.reward)
    assert any(isinstance(hook, KLReward) for hook in in_reward.hooks) and not in_reward.learns_without_advantage


def test_losses_of_hooks_add_up() -> None:
    algorithm = built(clipo__enabled=False, algorithm__kl__coefficient=0.3, algorithm__entropy_coefficient=0.01)
    more = {"reference_logprobs": torch.tensor(REFERENCE), "entropy": torch.ones(4)}
    tokens = tokens_at([1.0, 1.1, 0.9, 2.0], [1.0, -1.0, 1.0, 1.0], **more)
    total = algorithm.loss(tokens)
    assert torch.allclose(total, sum(hook.loss(tokens) for hook in algorithm.hooks))


def test_ungraded_rollouts_are_not_selected_and_hooks_can_leave_out_more() -> None:
    class OddRows(Hook):
        def select(self, table: RolloutTable, advantage: Tensor) -> Tensor:
            return torch.arange(table.size) % 2 == 1

    table = table_of([[1.0, None, 0.0, 1.0]])
    grpo = GRPO(PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 1))
    assert Algorithm([grpo]).select(table, table.reward).tolist() == [True, False, True, True]
    assert Algorithm([grpo, OddRows()]).select(table, table.reward).tolist() == [False, False, False, True]


def test_two_base_methods_or_none_are_refused() -> None:
    table = table_of([[1.0, 0.0]])
    grpo = GRPO(PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 1))
    for hooks, count in (([grpo, grpo], 2), ([Hook()], 0)):
        with pytest.raises(ValueError, match=f"exactly one base method .* {count} of"):
            Algorithm(hooks).advantage(table, table.reward)


def test_state_of_another_algorithm_is_refused() -> None:
    algorithm = built(clipo__enabled=False)
    algorithm.load_state_dict(algorithm.state_dict())
    with pytest.raises(ValueError, match="the checkpoint's algorithm has the hooks"):
        algorithm.load_state_dict(built().state_dict())
