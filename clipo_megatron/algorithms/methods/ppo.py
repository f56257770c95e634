"""Proximal policy optimisation with a critic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook, HookContext, ScoredTokens, Signal
from clipo_megatron.algorithms.policy_loss import BaselineSettings, ClippedPolicyLoss
from clipo_megatron.algorithms.whitening import centred
from clipo_megatron.flow import RolloutTable

# Added to the variance of the batch's advantages where they are whitened.
VARIANCE_EPSILON = 1e-8


class PPO(ClippedPolicyLoss):
    """arXiv 1707.06347 with generalised advantages, arXiv 1506.02438: each token's from a critic's values.

    With V_t the value of the state that predicts token t, and V = 0 behind the last token:

        delta_t = r_t + gamma V_(t+1) - V_t,   A_t = sum_k (gamma lam)^k delta_(t+k),   return_t = A_t + V_t

    The rollout's shaped reward, CLIPO's bonus with it, is r at the last token. A KL with algorithm.kl.place = reward is
    taken from the reward of each token by itself, by the estimate algorithm.kl.kind, and is no part of the rollout's
    reward. Rollouts that reached rollout.max_new_tokens end there as others do. The rollouts' column `advantage` is
    their reward before a critic sees it; so stages that scale advantages are refused.

    Assumes whole rollouts on one rank, scored by the critic under the weights before the update. Clip 0.2.

    Args:
        lam: of the advantages.
        critic_lam: of the returns that the critic learns, sum_k (gamma critic_lam)^k delta + V; None: as `lam`.
        gamma: discount a token.
        whiten: bring the advantages to mean 0 and variance 1 over the batch's tokens of rollouts that train.
    """

    needs = frozenset({Signal.values})
    credits_tokens = True
    reads_token_rewards = True

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        lam: float = 0.95,
        critic_lam: float | None = None,
        gamma: float = 1.0,
        whiten: bool = True,
    ):
        super().__init__(settings)
        self.lam, self.critic_lam, self.gamma, self.whiten = lam, critic_lam, gamma, whiten

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32, the rewards; 0 where ungraded."""
        return torch.where(table.graded, reward, 0.0)

    def open_ends(self, table: RolloutTable) -> Tensor:
        """[B] bool, rollouts that go on behind their last token: no reward there, but the value of their last state."""
        return torch.zeros_like(table.truncated)

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """[N] float32; sets the critic's returns."""
        left = tokens_left(tokens.rollout)
        open_end = self.open_ends(table).to(tokens.rows.device)[tokens.rows]
        value, after = tokens.signals["value"].double(), tokens.signals["next_value"].double()
        last = left == 0
        reward = torch.where(last & ~open_end, advantage.double(), 0.0)
        if tokens.rewards is not None:
            reward = reward + tokens.rewards
        delta = reward + self.gamma * torch.where(last & ~open_end, 0.0, after) - value
        gains = discounted_sums(delta, left, self.gamma * self.lam)
        critic_lam = self.lam if self.critic_lam is None else self.critic_lam
        own = gains if critic_lam == self.lam else discounted_sums(delta, left, self.gamma * critic_lam)
        tokens.returns = self.returns(own + value, value, open_end).float()
        if self.whiten:
            counted = table.graded | table.unfinished
            gains, variance = centred(gains, counted.to(gains.device)[tokens.rows], tokens.sum_over_ranks)
            gains = gains * torch.rsqrt(variance + VARIANCE_EPSILON)
        return gains.float()

    def returns(self, returns: Tensor, value: Tensor, open_end: Tensor) -> Tensor:
        """What the critic learns of each token, [N] float64, from the returns, its values, and which rollouts go on."""
        return returns


class TPPO(PPO):
    """arXiv 2506.15050, T-PPO: a step adds rollout.window_tokens to a response at most, and trains on what it added.

    The next step goes on with responses that have not ended, under its own weights; their earlier tokens are then
    context, which does not train again. The generalised advantages of a window continue from the critic's value of the
    last state, the one with the last token: delta_T = gamma V_(T+1) - V_T in place of r_T - V_T. A window has no reward
    at its end: the grader's reward, and CLIPO's bonus with it, act in the window in which the response ends. CLIPO
    compares the rollouts of a group that end in the same step, by their hidden states in that window. A KL in the
    reward acts in every window.

    Where rollout.window_tokens is not set, nothing is carried over, and responses cut off at rollout.max_new_tokens are
    taken for windows. Where it is set, they have ended there, with the grader's verdict. Policy and critic learn in
    every step, from the same tokens.

    Args:
        critic_learns_windows: false: in windows that go on the critic's return is the value that it gave, so that
            bootstrapped returns do not teach it.
        lam, critic_lam, gamma, whiten: as for PPO.
    """

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        lam: float = 0.95,
        critic_lam: float | None = None,
        gamma: float = 1.0,
        whiten: bool = True,
        critic_learns_windows: bool = True,
    ):
        super().__init__(
            settings,
            lam=lam,
            critic_lam=critic_lam,
            gamma=gamma,
            whiten=whiten,
        )
        self.critic_learns_windows = critic_learns_windows
        self.windows = False

    def bind(self, context: HookContext) -> None:
        """Whether rollouts go on from step to step."""
        self.windows = context.config.rollout.window_tokens is not None

    def open_ends(self, table: RolloutTable) -> Tensor:
        """[B] bool, those that the next step goes on with; without windows the truncated ones."""
        return table.unfinished if self.windows else table.truncated

    def returns(self, returns: Tensor, value: Tensor, open_end: Tensor) -> Tensor:
        """[N] float64."""
        return returns if self.critic_learns_windows else torch.where(open_end, value, returns)


class CriticWarmup(Hook):
    """The policy waits for the first `steps` steps, while the critic learns from its rollouts (critic.warmup_steps)."""

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0

    @property
    def holds_policy(self) -> bool:  # type: ignore[override]
        """Whether the next step still belongs to the warm-up."""
        return self.done < self.steps

    def after_update(self, table: RolloutTable) -> None:
        """Count the step."""
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """How many steps were made."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.done = int(state["done"])


def tokens_left(rollout: Tensor) -> Tensor:
    """How many tokens of its rollout follow each token, [N] int64; `rollout` [N] as in ScoredTokens."""
    ends = torch.bincount(rollout).cumsum(0)
    return ends[rollout] - 1 - torch.arange(rollout.numel(), device=rollout.device)


def discounted_sums(values: Tensor, left: Tensor, factor: float) -> Tensor:
    """S_t = sum_k factor^k values_(t+k) to the end of each rollout, [N].

    In log2(longest) rounds over all tokens at once: the sum of 2^(j+1) terms is one of 2^j, and that of the token 2^j
    places on times factor^(2^j).

    Args:
        values: [N] of the tokens of whole rollouts, one after the other.
        left: [N] int64, from `tokens_left`.
        factor: a token.
    """
    sums, reach = values, 1
    longest = int(left.max()) if left.numel() else 0
    place = torch.arange(values.numel(), device=values.device)
    while reach <= longest:
        there = left >= reach
        further = sums[torch.where(there, place + reach, place)]
        sums = sums + torch.where(there, factor**reach * further, 0.0)
        reach *= 2
    return sums
