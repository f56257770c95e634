"""Losses over whole groups against their formulas, written with loops over single rollouts; float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_tables import CASES, experience_of, table_of, tokens_of, with_options
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.methods.conspo import ConSPO
from clipo_megatron.algorithms.methods.copg import CoPG
from clipo_megatron.algorithms.methods.disco import DisCO, DiscoScore, Penalty
from clipo_megatron.algorithms.policy_loss import GroupLoss, PolicyLossSettings
from clipo_megatron.config.schema import Aggregation
from clipo_megatron.flow import RolloutTable

SHARED = PolicyLossSettings(0.0, 0.0, Aggregation.token_mean, 16)


def groups_of(table: RolloutTable) -> list[list[int]]:
    return [
        [row for row in range(table.size) if table.group[row] == number and table.graded[row]]
        for number in range(len(table.prompt_ids))
    ]


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def weight_of(table: RolloutTable, reward: Tensor, row: int) -> float:
    """Of a correct rollout: 1 and its bonus."""
    return max(1 + float(reward[row]) - float(table.reward[row]), 0.0)


def copg(table: RolloutTable, reward: Tensor, tokens: Any, *, beta: float) -> Tensor:
    per_group = []
    for rows in groups_of(table):
        regularised = []
        for row in rows:
            own = tokens.rollout == row
            log_ratio = (tokens.logprobs[own] - tokens.reference_logprobs[own]).sum()
            regularised.append(float(reward[row]) - beta * log_ratio)
        pairs = [(x - y) ** 2 for i, x in enumerate(regularised) for y in regularised[:i]]
        if pairs:
            per_group.append(mean(pairs))
    return mean(per_group)


def conspo(table: RolloutTable, reward: Tensor, tokens: Any, *, tau: float, margin: float, weighed: bool) -> Tensor:
    per_group = []
    for rows in groups_of(table):
        score = {row: tokens.logprobs[tokens.rollout == row].mean() for row in rows}
        right = [row for row in rows if table.correct[row]]
        wrong = [row for row in rows if not table.correct[row]]
        losses = []
        for row in right:
            own = (tau * (score[row] - margin)).exp()
            others = sum((tau * score[other]).exp() for other in wrong)
            weight = weight_of(table, reward, row) if weighed else 1.0
            losses.append(-weight * (own / (own + others)).log())
        if right and wrong:
            per_group.append(mean(losses))
    return mean(per_group)


def disco(table: RolloutTable, reward: Tensor, tokens: Any, *, ratio: bool, squared: bool, weighed: bool) -> Tensor:
    tau, per_group, gaps = (1.0 if ratio else 10.0), [], []
    for rows in groups_of(table):
        score = {}
        for row in rows:
            own = tokens.rollout == row
            new, old = tokens.logprobs[own], tokens.old_logprobs[own]
            score[row] = (new - old).exp().mean() if ratio else new.mean()
            gaps += list(old - new)
        right = [row for row in rows if table.correct[row]]
        wrong = [row for row in rows if not table.correct[row]]
        if right and wrong:
            hardest = tau * sum((score[row] / tau).exp() for row in wrong).log()
            weight = {row: weight_of(table, reward, row) if weighed else 1.0 for row in right}
            per_group.append(mean([weight[row] * (score[row] - hardest) for row in right]))
    excess = max(mean(gaps) - 1e-4, torch.zeros((), dtype=torch.float64))
    return -mean(per_group) + 1e3 * (excess**2 if squared else excess)


def built(method: type[GroupLoss], steps: int = 0, **options: Any) -> GroupLoss:
    hook = with_options(method, SHARED, **options)
    for _ in range(steps):
        hook.after_update(None, learned=True)
    return hook


LOSSES: dict[str, tuple[GroupLoss, Callable[..., Tensor], dict[str, Any]]] = {
    "CoPG": (built(CoPG), copg, {"beta": 0.1}),
    "CoPG, other b": (built(CoPG, beta=1.3), copg, {"beta": 1.3}),
    "ConSPO": (built(ConSPO), conspo, {"tau": 10.0, "margin": 0.0, "weighed": True}),
    "ConSPO, margin half there": (
        built(ConSPO, 50, weigh_by_reward=False),
        conspo,
        {"tau": 10.0, "margin": 0.005, "weighed": False},
    ),
    "ConSPO, whole margin": (
        built(ConSPO, 7, tau=3.0, margin=0.2, margin_steps=5),
        conspo,
        {"tau": 3.0, "margin": 0.2, "weighed": True},
    ),
    "DisCO": (built(DisCO), disco, {"ratio": False, "squared": False, "weighed": True}),
    "DisCO, ratio": (
        built(DisCO, score=DiscoScore.likelihood_ratio, penalty=Penalty.squared, weigh_by_reward=False),
        disco,
        {"ratio": True, "squared": True, "weighed": False},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_formula_s(name: str, case: str) -> None:
    """By two passes: the derivative by scores, then that of the scores by log-probs."""
    hook, formula, settings = LOSSES[name]
    for seed in range(3):
        table, reward = table_of(CASES[case], seed)
        tokens = tokens_of(table, seed)
        algorithm = Algorithm([hook])
        experience = experience_of(table, reward)
        rows = table.graded.nonzero().squeeze(1)
        per_token = hook.scores(tokens)
        summed = per_token.new_zeros(table.size, per_token.shape[1]).index_add(0, tokens.rollout, per_token)
        value, by_score = algorithm.group_loss(summed, experience, rows)
        (by_score.double()[tokens.rollout] * per_token).sum().backward()
        ours, tokens.logprobs.grad = tokens.logprobs.grad, None

        theirs = formula(table, reward, tokens, **settings)
        assert value == pytest.approx(float(theirs), rel=1e-6, abs=1e-6)
        if theirs.requires_grad:
            theirs.backward()
        expected = torch.zeros_like(ours) if tokens.logprobs.grad is None else tokens.logprobs.grad
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [ConSPO, DisCO])
def test_correct_rollouts_weigh_by_their_bonus_whatever_the_grader_pays(method: type[GroupLoss]) -> None:
    """A bonus of -2 leaves nothing of a rollout; a reward of 0 for the right answer leaves all."""
    table, _ = table_of(CASES["random"])
    rows = table.graded.nonzero().squeeze(1)
    bonus = torch.where(table.correct, torch.linspace(-0.5, 0.3, table.size), 0.0)
    bonus[rows[table.correct[rows]][0]] = -2.0
    scores = torch.randn(rows.numel(), 2, generator=torch.Generator().manual_seed(0)).double()
    scores[:, 1] = 0  # no KL

    def slopes(right: float, wrong: float) -> Tensor:
        """By the scores, [M]."""
        table.reward = torch.where(table.correct, right, wrong)
        leaf = scores.clone().requires_grad_()
        built(method).group_loss(leaf, experience_of(table, table.reward + bonus), rows).backward()
        return leaf.grad[:, 0]

    usual = slopes(1.0, 0.0)
    assert usual.any()
    correct = table.correct[rows]
    assert (usual[correct] <= 0).all() and int((usual[correct] == 0).sum()) == 1, "none is pushed down"
    for rewards in ((0.0, -1.0), (10.0, -10.0)):
        torch.testing.assert_close(slopes(*rewards), usual, rtol=0, atol=1e-6)


def test_the_loss_of_a_long_lead_is_finite() -> None:
    """Scores that differ by thousands neither overflow nor lose the gradient of those behind."""
    table, reward = table_of(CASES["one right"])
    scores = torch.where(table.correct, -500.0, 0.0)[:, None].double().requires_grad_()
    loss = built(ConSPO, weigh_by_reward=False).group_loss(scores, experience_of(table, reward), torch.arange(7))
    loss.backward()
    assert float(loss) == pytest.approx(5000.0, abs=2.0)
    assert torch.isfinite(scores.grad).all()
    assert float(scores.grad[table.correct].sum()) == pytest.approx(-10.0)


def test_the_margin_rises_only_while_the_policy_learns_and_goes_on_after_a_resumption() -> None:
    hook = built(ConSPO, 30)
    hook.after_update(None, learned=False)  # the policy waited
    resumed = built(ConSPO)
    resumed.load_state_dict(hook.state_dict())
    assert resumed.state_dict() == {"steps": 30}
    for each in (hook, resumed):
        each.after_update(None, learned=True)
        assert math.isclose(each.linear(0.0, each.options.margin, each.options.margin_steps), 0.0031)
