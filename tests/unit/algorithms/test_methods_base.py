"""Base methods against their formulas, written out in loops over Python's floats; tables and tokens without ranks."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from method_tables import CASES, experience_of, table_of, tokens_of, with_options
from policy_steps import made_up_context
from torch import Tensor

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import ScoredTokens, TokenBatch
from clipo_megatron.algorithms.methods.cispo import CISPO
from clipo_megatron.algorithms.methods.dapo import DAPO
from clipo_megatron.algorithms.methods.grpo import GRPO, DrGRPO
from clipo_megatron.algorithms.methods.gspo import GMPO, GSPO
from clipo_megatron.algorithms.methods.reinforce import RLOO, ReinforcePP, ReinforcePPBaseline, WhitenOver
from clipo_megatron.algorithms.methods.riskpo import BundleCredit, RiskPO
from clipo_megatron.algorithms.policy_loss import PolicyLoss, PolicyLossSettings
from clipo_megatron.config.schema import Aggregation, KLPlace, RunConfig
from clipo_megatron.flow import RolloutTable

SEEDS = range(3)


def built(kind: type[PolicyLoss], **options: Any) -> Any:
    """A base method with its default clip."""
    return with_options(kind, PolicyLossSettings(*kind.default_clip, Aggregation.token_mean, 9), **options)


def close(ours: Tensor, theirs: list[float]) -> None:
    """To 1e-6, of values above 1 relatively."""
    assert ours.dtype in (torch.float32, torch.float64) and ours.numel() == len(theirs)
    far = [(a, b) for a, b in zip(ours.tolist(), theirs, strict=True) if not abs(a - b) <= 1e-6 * max(1.0, abs(b))]
    assert far == []


def groups_of(table: RolloutTable) -> list[list[int]]:
    """Graded rows of each group."""
    return [
        [row for row in range(table.size) if int(table.group[row]) == group and bool(table.graded[row])]
        for group in range(len(table.prompt_ids))
    ]


def by_group(table: RolloutTable, reward: Tensor, formula: Any) -> list[float]:
    """`formula(own, all)` of each graded rollout of a group of at least two, else 0."""
    found, values = [0.0] * table.size, reward.double().tolist()
    for rows in groups_of(table):
        for row in rows if len(rows) > 1 else ():
            found[row] = formula(values[row], [values[other] for other in rows])
    return found


ADVANTAGES = {
    "grpo": (GRPO, lambda r, group: (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)),
    "dr_grpo": (DrGRPO, lambda r, group: r - statistics.fmean(group)),
    "rloo": (RLOO, lambda r, group: r - (math.fsum(group) - r) / (len(group) - 1)),
    "gspo": (GSPO, lambda r, group: (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)),
    "gmpo": (GMPO, lambda r, group: (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)),
    "dapo": (DAPO, lambda r, group: (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)),
    "cispo": (CISPO, lambda r, group: (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_groups(name: str, case: str) -> None:
    kind, formula = ADVANTAGES[name]
    for seed in SEEDS:
        table, reward = table_of(CASES[case], seed)
        close(built(kind).advantage(table, reward), by_group(table, reward, formula))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("over", list(WhitenOver))
@pytest.mark.parametrize(
    ("kind", "name"), [(ReinforcePP, "reinforce_pp"), (ReinforcePPBaseline, "reinforce_pp_baseline")]
)
def test_whitened_returns(kind: type[ReinforcePP], name: str, over: WhitenOver, case: str) -> None:
    for seed in SEEDS:
        table, reward = table_of(CASES[case], seed)
        values = reward.double().tolist()
        if kind is ReinforcePPBaseline:
            for rows in groups_of(table):
                mean = statistics.fmean([values[row] for row in rows]) if rows else 0.0
                for row in rows:
                    values[row] -= mean
        graded = [row for rows in groups_of(table) for row in rows]
        count = [int(table.response_length[row]) if over is WhitenOver.tokens else 1 for row in graded]
        batch = [values[row] for row, times in zip(graded, count, strict=True) for _ in range(times)]
        mean, std = statistics.fmean(batch), statistics.stdev(batch) if len(batch) > 1 else 0.0
        expected = [(values[row] - mean) / (std + 1e-6) if row in graded else 0.0 for row in range(table.size)]
        close(built(kind, over=over).advantage(table, reward), expected)


def test_whitened_over_tokens_is_whitened_by_length() -> None:
    table, _ = table_of([[True], [False]])
    table.response_length = torch.tensor([3, 1])
    by_token = built(ReinforcePP).advantage(table, table.reward)
    assert (
        float((by_token * table.response_length).sum()) == pytest.approx(0, abs=1e-6) and float(by_token.sum()) < -0.1
    )
    by_rollout = built(ReinforcePP, over=WhitenOver.rollouts).advantage(table, table.reward)
    assert by_rollout.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)


@pytest.mark.parametrize("case", ["random", "all right", "one right", "everything"])
@pytest.mark.parametrize("over", list(WhitenOver))
@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_returns_of_tokens_with_the_kl_in_the_reward(name: str, over: WhitenOver, case: str) -> None:
    """On two ranks that hold the same rollouts: the second one's sums are the first one's."""
    config = RunConfig()
    config.clipo.enabled = False
    config.algorithm.name, config.algorithm.options = name, {"over": over.value}
    config.algorithm.kl.coefficient, config.algorithm.kl.place = 0.3, KLPlace.reward
    algorithm = build_algorithm(config, made_up_context(config))
    assert algorithm.assigns_token_advantages
    table, reward = table_of(CASES[case], 1)
    batch = tokens_of(table, 2)
    tokens = ScoredTokens(
        rows=batch.rows,
        rollout=batch.rollout,
        old_logprobs=batch.old_logprobs,
        signals={},
        sum_over_ranks=lambda values: 2 * values,
        reference_logprobs=batch.reference_logprobs,
    )
    tokens.rewards = sum(each for hook in algorithm.hooks if (each := hook.token_reward(tokens, table)) is not None)
    ours = algorithm.token_advantage(tokens, table, algorithm.advantage(table, reward))
    values, gap = reward.double().tolist(), batch.reference_logprobs - batch.old_logprobs
    returns, weights = [0.0] * batch.rows.numel(), [0.0] * batch.rows.numel()
    for rows in groups_of(table):
        mean = statistics.fmean([values[row] for row in rows]) if rows and name == "reinforce_pp_baseline" else 0.0
        for row in rows:
            places = [place for place in range(len(returns)) if int(batch.rows[place]) == row]
            for place in places:
                x = [float(gap[each]) for each in places if each >= place]
                returns[place] = values[row] - mean - 0.3 * math.fsum(math.exp(each) - 1 - each for each in x)
                weights[place] = 1.0 if over is WhitenOver.tokens else 1 / len(places)
    pairs = list(zip(returns, weights, strict=True))
    count = 2 * math.fsum(weights)
    mean = 2 * math.fsum(value * weight for value, weight in pairs) / count
    std = math.sqrt(2 * math.fsum(weight * (value - mean) ** 2 for value, weight in pairs) / (count - 1))
    close(ours, [(value - mean) / (std + 1e-6) if weight else 0.0 for value, weight in pairs])


# --- DAPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("longest", "cushion"), [(8, 4), (8, None), (5, 5), (4, 1), (20480, 4096)])
def test_the_soft_penalty(longest: int, cushion: int | None) -> None:
    for case in CASES.values():
        table, reward = table_of(case)
        hook = built(DAPO, longest=longest, cushion=cushion, penalty=0.7)
        width = cushion or max(longest // 5, 1)
        expected = []
        for row in range(table.size):
            length, penalty = int(table.response_length[row]), 0.0
            if longest - width < length <= longest:
                penalty = ((longest - width) - length) / width
            elif length > longest:
                penalty = -1.0
            expected.append(float(reward[row]) + 0.7 * penalty * bool(table.graded[row]))
        close(hook.shape_reward(table, reward), expected)


def test_the_paper_s_lengths() -> None:
    table, _ = table_of([[True] * 5])
    table.response_length = torch.tensor([1, 16384, 18432, 20480, 30000])
    penalised = built(DAPO, longest=20480, cushion=4096).shape_reward(table, torch.zeros(5))
    assert penalised.tolist() == [0, 0, -0.5, -1, -1]


def test_without_a_run_there_is_no_longest_response() -> None:
    table, reward = table_of([[True]])
    with pytest.raises(ValueError, match="bind it to a run"):
        built(DAPO).shape_reward(table, reward)
    assert built(DAPO, penalty=0.0).shape_reward(table, reward) is reward


def test_the_overlong_filter() -> None:
    table, reward = table_of([[True, False, False]])
    table.truncated = torch.tensor([False, True, False])
    assert built(DAPO).select(table, reward) is None
    assert built(DAPO, overlong_filter=True).select(table, reward).tolist() == [True, False, True]


# --- losses ------------------------------------------------------------------------------------------------------


def token_loss(name: str, tokens: TokenBatch, low: float, high: float) -> tuple[list[float], list[float]]:
    """Loss of each token, and derivative of their sum by each log-prob, by the formulas."""
    lp, old, A = (each.detach().double().tolist() for each in (tokens.logprobs, tokens.old_logprobs, tokens.advantages))
    count = len(lp)
    loss, slope = [0.0] * count, [0.0] * count
    for rollout in sorted(set(tokens.rollout.tolist())):
        places = [place for place in range(count) if int(tokens.rollout[place]) == rollout]
        logs = {place: lp[place] - old[place] for place in places}
        if name == "gspo":
            s = math.exp(math.fsum(logs.values()) / len(places))
            for place in places:
                a, c = s * A[place], min(max(s, 1 - low), 1 + high) * A[place]
                loss[place] = -min(a, c)
                for other in places:
                    slope[other] += -a / len(places) if a <= c else 0.0
        elif name == "gmpo":
            held = {p: min(x, high) if A[p] > 0 else max(x, -low) for p, x in logs.items()}
            mean = math.exp(math.fsum(held.values()) / len(places))
            for place in places:
                loss[place] = -A[place] * mean
                for other in places:
                    slope[other] += -A[place] * mean / len(places) * (held[other] == logs[other])
        else:
            for place in places:
                rho = math.exp(logs[place])
                limited = min(max(rho, 1 - low), 1 + high)
                if name == "cispo":
                    loss[place], slope[place] = -limited * A[place] * lp[place], -limited * A[place]
                else:
                    loss[place] = -min(rho * A[place], limited * A[place])
                    slope[place] = -rho * A[place] if rho * A[place] <= limited * A[place] else 0.0
    return loss, slope


@pytest.mark.parametrize("scale", [0.3, 4.0])
@pytest.mark.parametrize(("name", "kind"), [(name, ADVANTAGES[name][0]) for name in ADVANTAGES])
def test_losses_and_gradients_of_tokens(name: str, kind: type[PolicyLoss], scale: float) -> None:
    table, reward = table_of(CASES["random"], 1)
    tokens = tokens_of(table, 2)
    noise = torch.randn(tokens.logprobs.numel(), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens.logprobs = (tokens.old_logprobs + scale * 0.5 * noise).requires_grad_()
    tokens.advantages = (reward - 0.5).double()[tokens.rollout]
    hook = built(kind)
    losses = hook.loss(tokens)
    losses.sum().backward()
    expected, slopes = token_loss(name, tokens, hook.clip_low, hook.clip_high)
    close(losses.detach(), expected)
    close(tokens.logprobs.grad, slopes)
    if scale > 1 and name != "cispo":
        assert 0 < sum(value == 0 for value in slopes) < len(slopes), "some are clipped"
    weighed = tokens_of(table, 2)
    weighed.logprobs, weighed.advantages = tokens.logprobs.detach(), tokens.advantages
    weighed.importance = torch.rand(noise.numel(), dtype=torch.float64)
    close(hook.loss(weighed), [a * float(b) for a, b in zip(expected, weighed.importance, strict=True)])


@pytest.mark.parametrize("scale", [0.01, 0.3, 4.0])
@pytest.mark.parametrize(("name", "kind"), [("gspo", GSPO), ("gmpo", GMPO)])
def test_advantages_of_single_tokens_reach_their_tokens(name: str, kind: type[PolicyLoss], scale: float) -> None:
    """Value and clip by the whole rollout, the gradient of each token by its own advantage and importance weight."""
    table, _ = table_of(CASES["random"], 1)
    tokens = tokens_of(table, 2)
    generator = torch.Generator().manual_seed(4)
    noise, advantages, weights = (torch.randn(tokens.rows.numel(), generator=generator).double() for _ in range(3))
    tokens.logprobs = (tokens.old_logprobs + 0.5 * scale * noise).requires_grad_()
    tokens.advantages = torch.where(weights > 1, 0.0, advantages)  # some tokens shall not learn
    tokens.importance = weights.abs()
    hook = built(kind)
    losses = hook.loss(tokens)
    losses.sum().backward()
    values, slopes = [0.0] * noise.numel(), [0.0] * noise.numel()
    logs = (tokens.logprobs.detach() - tokens.old_logprobs).tolist()
    A, weight, low, high = tokens.advantages.tolist(), tokens.importance.tolist(), hook.clip_low, hook.clip_high
    for row in range(table.size):
        places = [place for place in range(len(logs)) if int(tokens.rollout[place]) == row]
        held = {p: min(logs[p], high) if A[p] > 0 else max(logs[p], -low) for p in places}
        inside = logs if name == "gspo" else held
        s = math.exp(math.fsum(inside[place] for place in places) / len(places))
        for p in places:
            if name == "gspo":
                free, bound = s * A[p], min(max(s, 1 - low), 1 + high) * A[p]
                values[p], slopes[p] = -weight[p] * min(free, bound), -weight[p] * free * (free <= bound)
            else:
                values[p], slopes[p] = -weight[p] * s * A[p], -weight[p] * s * A[p] * (held[p] == logs[p])
    close(losses.detach(), values)
    close(tokens.logprobs.grad, slopes)
    assert not tokens.logprobs.grad[tokens.advantages == 0].any()


# --- RiskPO ------------------------------------------------------------------------------------------------------


def risk_by_hand(table: RolloutTable, reward: Tensor, quantiles: list[float] | None, **options: Any) -> tuple[Any, ...]:
    """Advantages, the step's scores, and the quantiles before and after it, by the formulas."""
    B, levels = options.get("bundle", 5), (0.2, 0.9)
    papers: dict[tuple[int, int], list[int]] = {}
    for group, rows in enumerate(groups_of(table)):
        for number, row in enumerate(rows):
            papers.setdefault((group // B, number), []).append(row)
    values = reward.double().tolist()
    scores = {key: B * statistics.fmean([values[row] for row in rows]) for key, rows in papers.items()}
    if quantiles is None:
        ordered = sorted(scores.values())
        quantiles = []
        for level in levels:
            place = level * (len(ordered) - 1)
            below, part = int(place), place - int(place)
            quantiles.append(ordered[below] + part * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below]))
    low, high = quantiles
    found = [0.0] * table.size
    for (bundle, number), rows in papers.items():
        S = scores[bundle, number]
        rvar = (max(S - low, 0) - max(S - high, 0) + low - high) / (0.9 - 0.2)
        cvar = -max(low - S, 0) / 0.2
        value = (1.5 * cvar + rvar) / (1.5 + 1)
        if options.get("by_std"):
            own = [score for (other, _), score in scores.items() if other == bundle]
            std = statistics.stdev(own) if len(own) > 1 else 0.0
            value /= std + 1e-6 if std > 1e-3 else 1.0
        for row in rows:
            found[row] = value
            if options.get("credit") is BundleCredit.prompt_std:
                (group,) = (group for group in groups_of(table) if row in group)
                std = statistics.stdev([values[other] for other in group]) if len(group) > 1 else 0.0
                found[row] /= std + 1e-6 if std > 1e-3 else 1.0
    moved = [
        q + 0.1 * (level - statistics.fmean([score < q for score in scores.values()]))
        for q, level in zip(quantiles, levels, strict=True)
    ]
    return found, scores, quantiles, moved


OPTIONS = [{}, {"bundle": 2}, {"by_std": True, "bundle": 2}, {"credit": BundleCredit.prompt_std, "bundle": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_risk_of_bundles(case: str, options: dict[str, Any]) -> None:
    hook, quantiles = built(RiskPO, **options), None
    for seed in SEEDS:  # steps
        table, reward = table_of(CASES[case], seed)
        expected, _, before, quantiles = risk_by_hand(table, reward, quantiles, **options)
        close(hook.advantage(table, reward), expected)
        assert hook.quantiles == pytest.approx(before, abs=1e-9)
        hook.after_update(experience_of(table, reward), learned=True)
        assert hook.quantiles == pytest.approx(quantiles, abs=1e-9)


def test_quantiles_may_be_given_and_none_means_the_first_step_s() -> None:
    assert built(RiskPO, start=0.0).quantiles == [0.0, 0.0]
    table, reward = table_of([[None, None]])
    hook = built(RiskPO)
    assert not hook.advantage(table, reward).any()
    hook.after_update(experience_of(table, reward), learned=True)
    assert hook.quantiles is None, "a step without a verdict says nothing of them"


def test_quantiles_come_near_the_true_ones() -> None:
    hook = built(RiskPO, bundle=1, rate=0.02, start=0.5)
    for seed in range(400):
        table, _ = table_of([[True] * 5] * 8)
        reward = torch.rand(40, generator=torch.Generator().manual_seed(seed))
        hook.advantage(table, reward)
        hook.after_update(experience_of(table, reward), learned=True)
    assert hook.quantiles == pytest.approx([0.2, 0.9], abs=0.05)


def test_a_resumed_run_has_the_quantiles() -> None:
    steps = [table_of(CASES["everything"], seed) for seed in range(4)]

    def run(hook: RiskPO, part: Any) -> list[Tensor]:
        advantages = []
        for table, reward in part:
            advantages.append(hook.advantage(table, reward))
            hook.after_update(experience_of(table, reward), learned=True)
        return advantages

    whole, first, resumed = (built(RiskPO) for _ in range(3))
    expected = run(whole, steps)
    run(first, steps[:2])
    resumed.load_state_dict(first.state_dict())
    for ours, theirs in zip(run(resumed, steps[2:]), expected[2:], strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.state_dict() == whole.state_dict()
    assert not torch.equal(run(built(RiskPO), steps[2:])[0], expected[2]), "the state matters"
