"""PPO and T-PPO: advantages of single tokens from a critic's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, HookContext, MethodOptions, ScoredTokens, Signal
from clipo_megatron.algorithms.policy_loss import ClippedPolicyLoss, PolicyLossSettings
from clipo_megatron.algorithms.whitening import centred
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import Experience, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

# Added to the variance of the batch's advantages where they are whitened.
VARIANCE_EPSILON = 1e-8


@dataclass
class PpoOptions(MethodOptions):
    lam: float = within(0.95, 0, 1)  # lambda of the generalised advantages
    critic_lam: Optional[float] = within(None, 0, 1)  # lambda of the returns that the critic learns; null: as lam
    gamma: float = within(1.0, 0, 1)  # discount a token
    whiten: bool = True  # bring the advantages to mean 0 and variance 1 over the batch's tokens


@dataclass
class TppoOptions(PpoOptions):
    critic_learns_windows: bool = True  # false: windows that go on teach the critic nothing


class PPO(ClippedPolicyLoss):
    """arXiv 1707.06347 with generalised advantages, arXiv 1506.02438: each token's from a critic's values.

    With V_t the value of the state that predicts token t, and V = 0 after the last token:

        delta_t = r_t + gamma V_(t+1) - V_t,   A_t = sum_k (gamma lam)^k delta_(t+k),   return_t = A_t + V_t

    The rollout's shaped reward, CLIPO's bonus included, is r at the last token. A KL with algorithm.kl.place = reward
    is subtracted from each token's own reward, by the estimate algorithm.kl.kind, and is no part of the rollout's
    reward. Rollouts that reached rollout.max_new_tokens end there as others do. The rollouts' column `advantage` is
    their reward before a critic sees it, so hooks that scale advantages are refused.

    With `critic_lam` the critic learns sum_k (gamma critic_lam)^k delta_(t+k) + V_t instead. Advantages are whitened
    over the tokens of rollouts that train. Assumes whole rollouts on one rank, scored by the critic under the weights
    before the update.
    """

    source = "arXiv 1707.06347"
    summary = "advantages of single tokens, from a critic's values"
    options_class = PpoOptions
    needs = frozenset({Signal.values})
    needs_groups = False
    reads_token_rewards = True

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """The rewards, [B] float32, 0 where ungraded: a critic turns them into advantages of tokens."""
        return torch.where(table.graded, reward, 0.0)

    def open_ends(self, table: RolloutTable) -> Tensor:
        """Which rollouts go on after their last token, [B] bool: there they have a value to bootstrap from, and no
        reward."""
        return torch.zeros_like(table.truncated)

    def token_advantage(self, tokens: ScoredTokens, table: RolloutTable, advantage: Tensor) -> Tensor:
        """The generalised advantages, [N] float32; sets `tokens.returns` for the critic."""
        options = self.options
        left = tokens_left(tokens.rollout)
        open_end = self.open_ends(table).to(tokens.rows.device)[tokens.rows]
        value, after = tokens.signals["value"].double(), tokens.signals["next_value"].double()
        last = left == 0
        reward = torch.where(last & ~open_end, advantage.double(), 0.0)
        if tokens.rewards is not None:
            reward = reward + tokens.rewards
        delta = reward + options.gamma * torch.where(last & ~open_end, 0.0, after) - value
        gains = discounted_sums(delta, left, options.gamma * options.lam)
        critic_lam = options.lam if options.critic_lam is None else options.critic_lam
        own = gains if critic_lam == options.lam else discounted_sums(delta, left, options.gamma * critic_lam)
        tokens.returns = self.returns(own + value, value, open_end).float()
        if options.whiten:
            counted = table.graded | table.unfinished
            gains, variance = centred(gains, counted.to(gains.device)[tokens.rows], tokens.sum_over_ranks)
            gains = gains * torch.rsqrt(variance + VARIANCE_EPSILON)
        return gains.float()

    def returns(self, returns: Tensor, value: Tensor, open_end: Tensor) -> Tensor:
        """The return that the critic learns for each token, [N] float64.

        Args:
            returns: [N] float64, as computed.
            value: [N] float64, the critic's values.
            open_end: [N] bool, whether the token's rollout goes on.
        """
        return returns


class TPPO(PPO):
    """arXiv 2506.15050, truncated PPO: a step adds at most rollout.window_tokens to a response, and trains on what it
    added.

    The next step goes on with responses that have not ended, under its own weights; their earlier tokens are then
    context, which does not train again. The generalised advantages of a window continue from the critic's value of the
    last state, the one with the last token: delta_T = gamma V_(T+1) - V_T in place of r_T - V_T. A window that goes on
    has no reward at its end: the grader's reward and CLIPO's bonus act in the window in which the response ends. CLIPO
    compares the rollouts of a group that end in the same step, by their hidden states in that window. A KL in the
    reward acts in every window.

    Where rollout.window_tokens is not set, nothing is carried over, and responses cut off at rollout.max_new_tokens are
    taken for windows that go on. Where it is set, such responses have ended, with the grader's verdict. Policy and
    critic learn in every step, from the same tokens. Without `critic_learns_windows` the critic's return in windows
    that go on is the value that it gave, so that bootstrapped returns do not teach it.
    """

    source = "arXiv 2506.15050"
    summary = "responses that grow in windows, which continue at the critic's value"
    options_class = TppoOptions
    supports_windows = True

    def __init__(self, settings: PolicyLossSettings, options: TppoOptions | None = None):
        super().__init__(settings, options)
        self.windows = False  # whether rollouts go on from step to step

    def bind(self, context: HookContext) -> None:
        self.windows = context.config.rollout.window_tokens is not None

    def open_ends(self, table: RolloutTable) -> Tensor:
        """The rollouts that the next step goes on with, [B] bool; without windows the truncated ones."""
        return table.unfinished if self.windows else table.truncated

    def returns(self, returns: Tensor, value: Tensor, open_end: Tensor) -> Tensor:
        return returns if self.options.critic_learns_windows else torch.where(open_end, value, returns)


class CriticWarmup(Hook):
    """Freezes the policy for the first `steps` steps (critic.warmup_steps); the critic learns from its rollouts."""

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0

    @property
    def freezes_policy(self) -> bool:  # type: ignore[override]
        """Whether the next step still belongs to the warm-up."""
        return self.done < self.steps

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])


def tokens_left(rollout: Tensor) -> Tensor:
    """How many tokens of its rollout follow each token, [N] int64; `rollout` [N] as in ScoredTokens."""
    ends = torch.bincount(rollout).cumsum(0)
    return ends[rollout] - 1 - torch.arange(rollout.numel(), device=rollout.device)


def discounted_sums(values: Tensor, left: Tensor, factor: float) -> Tensor:
    """S_t = sum_k factor^k values_(t+k) to the end of each rollout, [N].

    It takes log2(longest) rounds over all tokens at once: a sum of 2^(j+1) terms is the sum of the first 2^j, plus
    factor^(2^j) times that of the token 2^j places on.

    Args:
        values: [N], the tokens of whole rollouts, one rollout after the other.
        left: [N] int64, from `tokens_left`.
        factor: the discount a token.
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
