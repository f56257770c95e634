"""PPO's and T-PPO's advantages and returns against loops in float64, and the critic's warm-up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_tables import with_options

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import ScoredTokens
from clipo_megatron.algorithms.kl import KLReward
from clipo_megatron.algorithms.methods.ppo import PPO, TPPO, CriticWarmup, discounted_sums, tokens_left
from clipo_megatron.algorithms.policy_loss import PolicyLossSettings
from clipo_megatron.config.schema import Aggregation, KLConfig, KLKind, KLPlace, RunConfig
from clipo_megatron.flow import RolloutTable

SHARED = PolicyLossSettings(0.2, 0.2, Aggregation.token_mean, 16)
GROUPS = {
    "random": [[True, False, True], [False, False, True]],
    "all right": [[True, True, True]],
    "all wrong": [[False, False]],
    "one right": [[False, True, False, False]],
    "single": [[True], [False]],
}


def table_of(groups: list[list[bool]], seed: int) -> RolloutTable:
    """Shaped rewards are 1.3 or -0.2; one rollout of the first group is ungraded where there are three."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.tensor([each for group in groups for each in group])
    size = correct.numel()
    lengths = torch.randint(1, 12, (size,), generator=generator)
    graded = torch.ones(size, dtype=torch.bool)
    if len(groups[0]) == 3:
        graded[1] = False
    return RolloutTable(
        prompt_ids=[str(place) for place in range(len(groups))],
        group=torch.tensor([place for place, group in enumerate(groups) for _ in group]),
        correct=correct & graded,
        graded=graded,
        reward=torch.where(correct, 1.3, -0.2) * graded,
        prompt_length=torch.full((size,), 3),
        response_length=lengths,
        truncated=torch.arange(size) % 2 == 1,
        version=torch.zeros(size, dtype=torch.int64),
    )


def tokens_of(table: RolloutTable, seed: int) -> ScoredTokens:
    """Made-up values and log-probs of a table's tokens, all on one rank."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.repeat_interleave(torch.arange(table.size), table.response_length)
    value, after, old, reference = torch.randn(4, rows.numel(), generator=generator).unbind()
    last = tokens_left(rows) == 0
    after = torch.where(last, after, value.roll(-1))
    signals = {"value": value, "next_value": after}
    return ScoredTokens(rows, rows, old, signals, sum_over_ranks=torch.clone, reference_logprobs=reference)


def by_loops(
    table: RolloutTable,
    tokens: ScoredTokens,
    *,
    lam: float,
    critic_lam: float | None,
    gamma: float,
    whiten: bool,
    kl: float = 0.0,
    windows: bool = False,
    critic_learns_windows: bool = True,
) -> tuple[list[float], list[float]]:
    """Advantages and returns, token by token."""
    value, after = tokens.signals["value"].tolist(), tokens.signals["next_value"].tolist()
    old, reference = tokens.old_logprobs.tolist(), tokens.reference_logprobs.tolist()
    advantages, returns, place = [], [], 0
    for row, length in enumerate(table.response_length.tolist()):
        open_end = windows and bool(table.truncated[row])
        deltas = []
        for t in range(length):
            reward = -kl * (old[place + t] - reference[place + t])
            following = value[place + t + 1] if t + 1 < length else (after[place + t] if open_end else 0.0)
            if t + 1 == length and not open_end:
                reward += float(table.reward[row])
            deltas.append(reward + gamma * following - value[place + t])
        for t in range(length):
            advantages.append(sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)))
            own = lam if critic_lam is None else critic_lam
            target = sum((gamma * own) ** (k - t) * deltas[k] for k in range(t, length)) + value[place + t]
            returns.append(value[place + t] if open_end and not critic_learns_windows else target)
        place += length
    if whiten:
        counts = [bool(table.graded[row]) for row in tokens.rows.tolist()]
        kept = [each for each, counted in zip(advantages, counts, strict=True) if counted]
        mean = sum(kept) / len(kept)
        spread = sum((each - mean) ** 2 for each in kept) / max(len(kept) - 1, 1)
        advantages = [
            (each - mean) / math.sqrt(spread + 1e-8) if counted else 0.0
            for each, counted in zip(advantages, counts, strict=True)
        ]
    return advantages, returns


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "options",
    [
        {"lam": 0.95, "critic_lam": None, "gamma": 1.0, "whiten": True},
        {"lam": 0.9, "critic_lam": 1.0, "gamma": 0.99, "whiten": False},
        {"lam": 0.0, "critic_lam": 0.5, "gamma": 1.0, "whiten": False},
    ],
    ids=["defaults", "two lambdas", "one step"],
)
@pytest.mark.parametrize("method", ["ppo", "ppo with KL", "t_ppo", "t_ppo, windows not learnt"])
def test_advantages_and_returns(method: str, options: dict[str, Any], groups: str) -> None:
    for seed in range(3):
        table = table_of(GROUPS[groups], seed)
        tokens = tokens_of(table, seed)
        learnt = "not learnt" not in method
        if method.startswith("t_ppo"):
            hook: PPO = with_options(TPPO, SHARED, **options, critic_learns_windows=learnt)
        else:
            hook = with_options(PPO, SHARED, **options)
        kl = 0.1 if "KL" in method else 0.0
        hooks = [hook, KLReward(kl, KLKind.k1, per_token=True)] if kl else [hook]
        algorithm = Algorithm(hooks)
        reward = algorithm.shape_reward(table)
        advantage = algorithm.advantage(table, reward)
        assert torch.equal(advantage, table.reward)
        ours = algorithm.token_advantage(tokens, table, advantage)
        advantages, returns = by_loops(
            table, tokens, **options, kl=kl, windows=isinstance(hook, TPPO), critic_learns_windows=learnt
        )
        assert ours.tolist() == pytest.approx(advantages, rel=1e-6, abs=1e-6)
        assert tokens.returns.tolist() == pytest.approx(returns, rel=1e-6, abs=1e-6)


def test_sums_do_not_reach_into_the_next_rollout() -> None:
    rollout = torch.tensor([0, 0, 0, 1, 2, 2])
    left = tokens_left(rollout)
    assert left.tolist() == [2, 1, 0, 0, 1, 0]
    assert discounted_sums(torch.ones(6), left, 0.5).tolist() == [1.75, 1.5, 1.0, 1.0, 1.5, 1.0]
    assert discounted_sums(torch.ones(0), left[:0], 0.5).tolist() == []


def test_a_long_rollout_is_summed_exactly() -> None:
    values = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = tokens_left(torch.zeros(5000, dtype=torch.int64))
    expected, total = [], 0.0
    for value in reversed(values.tolist()):
        total = value + 0.97 * total
        expected.append(total)
    assert discounted_sums(values, left, 0.97).tolist() == pytest.approx(expected[::-1], rel=1e-9, abs=1e-9)


def test_whitening_is_over_all_ranks() -> None:
    """Two ranks' tokens apart, with what the other one has added up, are those of one rank."""
    table = table_of(GROUPS["random"], 0)
    whole = tokens_of(table, 0)
    hook = PPO(SHARED)
    expected = hook.token_advantage(whole, table, table.reward[whole.rows])
    heard: list[list[torch.Tensor]] = []
    for half in (whole.rows < 3, whole.rows >= 3):
        said: list[torch.Tensor] = []
        hook.token_advantage(_part(whole, half, said.append), table, table.reward[whole.rows[half]])
        heard.append(said)
    # the first sums of both ranks are right; the second ones need the first answered
    first = heard[0][0] + heard[1][0]
    squares = []
    for half in (whole.rows < 3, whole.rows >= 3):
        said = []
        hook.token_advantage(_part(whole, half, said.append, [first]), table, table.reward[whole.rows[half]])
        squares.append(said[1])
    parts = [
        hook.token_advantage(
            _part(whole, half, lambda _: None, [first, squares[0] + squares[1]]), table, table.reward[whole.rows[half]]
        )
        for half in (whole.rows < 3, whole.rows >= 3)
    ]
    assert torch.cat(parts).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def _part(whole: ScoredTokens, half: torch.Tensor, note: Any, answers: list[torch.Tensor] | None = None) -> Any:
    left = list(answers or [])

    def over_ranks(own: torch.Tensor) -> torch.Tensor:
        note(own.clone())
        return left.pop(0) if left else own.clone()

    rows = whole.rows[half]
    signals = {name: each[half] for name, each in whole.signals.items()}
    return ScoredTokens(rows, rows - rows.min(), whole.old_logprobs[half], signals, sum_over_ranks=over_ranks)


def test_the_policy_waits_for_the_critic_also_after_a_resumption() -> None:
    config = RunConfig()
    config.clipo.enabled, config.algorithm.name, config.critic.warmup_steps = False, "ppo", 2
    algorithm, table = build_algorithm(config), table_of(GROUPS["random"], 0)
    experience = algorithm.assign_advantages(table, [])
    learnt = []
    for step in range(4):
        plan = algorithm.replay(experience)
        learnt.append(len(plan))
        algorithm.after_update(experience, learned=bool(plan))
        if step == 0:
            resumed = build_algorithm(config)
            resumed.load_state_dict(algorithm.state_dict())
            algorithm = resumed
    assert learnt == [0, 0, 1, 1]
    config.algorithm.name = "grpo"
    assert not any(isinstance(hook, CriticWarmup) for hook in build_algorithm(config).hooks)


def test_a_kl_in_the_reward_is_counted_once() -> None:
    config = RunConfig()
    config.clipo.enabled, config.algorithm.name = False, "ppo"
    config.algorithm.kl = KLConfig(coefficient=0.5, kind=KLKind.k1, place=KLPlace.reward)
    algorithm, table = build_algorithm(config), table_of(GROUPS["one right"], 0)
    table.signals["kl"] = torch.full((table.size,), 7.0)
    assert torch.equal(algorithm.shape_reward(table), table.reward)
    assert "reference_kl" not in algorithm.needs, "its sums are not computed for nothing"
    config.algorithm.name = "grpo"
    algorithm = build_algorithm(config)
    assert torch.equal(algorithm.shape_reward(table), table.reward - 3.5)
    assert {"reference_logprobs", "reference_kl"} <= algorithm.needs


def test_a_base_method_of_one_s_own_may_read_rewards_of_tokens(tmp_path: Path) -> None:
    """It says so by `reads_token_rewards`, as PPO does; without it the KL is in the rollouts' rewards."""
    (tmp_path / "mine.py").write_text(
        "from clipo_megatron.algorithms.methods.grpo import GRPO\n\n\n"
        "class Tokens(GRPO):\n    reads_token_rewards = True\n\n"
        "    def token_advantage(self, tokens, table, advantage):\n        return advantage + tokens.rewards\n\n\n"
        "class Rollouts(GRPO):\n"
        "    def token_advantage(self, tokens, table, advantage):\n"
        "        assert tokens.rewards is None\n        return advantage\n"
    )
    config, table = RunConfig(), table_of(GROUPS["one right"], 0)
    config.clipo.enabled = False
    config.algorithm.kl = KLConfig(coefficient=0.5, kind=KLKind.k1, place=KLPlace.reward)
    tokens = tokens_of(table, 0)
    gap = 0.5 * (tokens.old_logprobs - tokens.reference_logprobs)
    table.signals["kl"] = 2 * torch.zeros(table.size).index_add(0, tokens.rollout, gap)
    for name in ("Tokens", "Rollouts"):
        config.algorithm.name = f"{tmp_path}/mine.py:{name}"
        algorithm = build_algorithm(config)
        reward = algorithm.shape_reward(table)
        advantage = algorithm.advantage(table, reward)
        given = algorithm.token_advantage(tokens, table, advantage)
        expected = advantage[tokens.rows] - (gap if name == "Tokens" else 0)
        torch.testing.assert_close(given, expected)
        assert torch.equal(reward, table.reward) == (name == "Tokens")
