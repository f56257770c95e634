"""What base methods share: their defaults, how the tokens of a mini-batch weigh, PPO's clipped loss, losses over
groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import Hook, TokenBatch
from clipo_megatron.config.schema import Aggregation
from clipo_megatron.flow import Experience, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

# exp(80) = 5.5e34 fits into float32 with room for an advantage; from 88.7 on it is infinite.
LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True, slots=True)
class PolicyLossSettings:
    """The settings that all base methods share.

    Attributes:
        clip_low, clip_high: how far a probability ratio may fall below and rise above 1; not every loss clips.
        aggregation: how the tokens of a mini-batch weigh.
        constant_length: the length in tokens that the aggregation `constant` divides by.
        dual_clip: how often the loss of a token with negative advantage may be its -A at most; None: no limit.
        log_ratio_limit: log ratios are held within +-this; None: they are not.
    """

    clip_low: float
    clip_high: float
    aggregation: Aggregation
    constant_length: int
    dual_clip: float | None = None
    log_ratio_limit: float | None = None


BaselineSettings = PolicyLossSettings  # the former name, which methods of users may import


class PolicyLoss(Hook):
    """A base method: the hook that gives advantages and weighs tokens in the loss; most give the policy's loss too."""

    default_clip: ClassVar[tuple[float, float] | None] = (0.2, 0.2)  # clip_low, clip_high; None: nothing is clipped
    clip_low_below_one: ClassVar[bool] = True  # whether clip_low is subtracted from a ratio of 1
    default_aggregation: ClassVar[Aggregation | None] = Aggregation.token_mean  # None: a loss over whole groups
    default_max_refill_rounds: ClassVar[int] = 0  # of rollout.max_refill_rounds
    needs_groups: ClassVar[bool] = True  # whether it learns nothing from a prompt with a single rollout
    reads_token_rewards: ClassVar[bool] = False  # whether `token_advantage` reads tokens.rewards

    def __init__(self, settings: PolicyLossSettings, options: Any = None) -> None:
        super().__init__(options)
        self.clip_low, self.clip_high = settings.clip_low, settings.clip_high
        self.aggregation, self.constant_length = settings.aggregation, settings.constant_length
        self.dual_clip, self.log_ratio_limit = settings.dual_clip, settings.log_ratio_limit

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """Advantages [B] float32 from the shaped rewards, bonus included."""
        raise NotImplementedError

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor:
        """The weight of each response token of every rollout: [B] float32, zero outside `rows`.

        token_mean     1 / sum of all lengths
        sequence_mean  1 / (rollouts * own length)
        constant       1 / (rollouts * constant length)

        Summed over all tokens of `rows` the weights are 1, except for `constant`.

        Args:
            table: the step's facts.
            rows: [M] int64, the rows of one mini-batch over all ranks.
        """
        lengths = table.response_length[rows].float()
        if self.aggregation is Aggregation.token_mean:
            per_token = (1.0 / lengths.sum()).expand_as(lengths)
        elif self.aggregation is Aggregation.sequence_mean:
            per_token = 1.0 / (lengths.numel() * lengths)
        else:
            per_token = torch.full_like(lengths, 1.0 / (max(lengths.numel(), 1) * self.constant_length))
        weight = torch.zeros(table.size)
        weight[rows] = per_token
        return weight


class ClippedPolicyLoss(PolicyLoss):
    """PPO's clipped loss on each token: max(-rho A, -clip(rho, 1 - low, 1 + high) A), arXiv 1707.06347.

    rho is the ratio to the policy that scored the rollouts before the update; importance weights multiply the whole.
    Different bounds low and high are DAPO's clip-higher (arXiv 2503.14476). With `dual_clip` c the loss is at most
    -c A where A < 0 (arXiv 1912.09729), so that a token of any ratio is clipped there too.
    """

    def log_ratio(self, tokens: TokenBatch) -> Tensor:
        """[N] float32, the log of the ratio that is clipped: here each token's own."""
        return tokens.logprobs - tokens.old_logprobs

    def loss(self, tokens: TokenBatch) -> Tensor:
        log_ratio = self.log_ratio(tokens)
        if self.log_ratio_limit is not None:
            log_ratio = log_ratio.clamp(-self.log_ratio_limit, self.log_ratio_limit)
        # Where the advantage is not negative, a large ratio is clipped, or multiplies 0.
        idle = (tokens.advantages >= 0) | without_importance(tokens)
        if self.dual_clip is not None:
            idle = torch.ones_like(idle)
        ratio = exp_where_it_acts(log_ratio, idle=idle)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        plain, limited = -ratio * tokens.advantages, -clipped * tokens.advantages
        tokens.metrics["policy/clip_fraction"] = (tokens.weights * (limited > plain)).sum().detach()
        loss = torch.maximum(plain, limited)
        if self.dual_clip is not None:
            most = -self.dual_clip * tokens.advantages
            above = (tokens.advantages < 0) & (loss > most)
            tokens.metrics["policy/dual_clip_fraction"] = (tokens.weights * above).sum().detach()
            loss = torch.where(above, most, loss)
        return loss if tokens.importance is None else tokens.importance * loss


def exp_where_it_acts(log_ratio: Tensor, *, idle: Tensor) -> Tensor:
    """exp(log_ratio) [N], whose gradient is exactly 0, not 0 times infinity, where it overflows and nothing learns from
    it.

    Args:
        log_ratio: [N] float32, with gradient.
        idle: [N] bool, tokens from which nothing is learned if their ratio is large: they are clipped or masked.
    """
    return torch.where(idle & (log_ratio > LARGEST_LOG_RATIO), LARGEST_LOG_RATIO, log_ratio).exp()


def without_importance(tokens: TokenBatch) -> Tensor:
    """Which tokens an off-policy correction has masked, [N] bool."""
    if tokens.importance is None:
        return torch.zeros_like(tokens.rollout, dtype=torch.bool)
    return tokens.importance == 0


class GroupLoss(PolicyLoss):
    """A base method whose loss compares whole rollouts, which no micro-batch holds together.

    So an update takes two passes: scores of all rollouts without gradient, `group_loss` on them, and then its
    derivative by each score as the weight of that score's own gradient. The result does not depend on micro-batches or
    layout.

    The advantage is 0, and token weights are those of token_mean: the terms of other hooks (KL, entropy) use them.
    """

    default_clip = None
    default_aggregation = None
    learns_without_advantage = True
    takes_off_policy_rollouts: ClassVar[bool] = False  # whether the loss holds for rollouts of any policy

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        return torch.zeros_like(reward)

    def scores(self, tokens: TokenBatch) -> Tensor:
        """What each token adds to the scores of its rollout, [N, C] float32, with gradient."""
        raise NotImplementedError

    def group_loss(self, scores: Tensor, experience: Experience, rows: Tensor) -> Tensor:
        """The loss of a mini-batch, a scalar, from its scores [M, C] float64; `rows` [M] int64 are its table rows."""
        raise NotImplementedError


def bonus_weight(experience: Experience, rows: Tensor) -> Tensor:
    """The weight of each of `rows` [M] by what hooks added to the grader's reward: 1 + that, at least 0; [M] float64.

    The grader's own reward is left out, whatever its scale: the verdicts are in the loss already. A weight below 0
    would push correct rollouts down.
    """
    added = experience.reward[rows].double() - experience.table.reward[rows].double()
    return (1 + added).clamp(min=0)
