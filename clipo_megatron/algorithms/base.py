"""The stages of an algorithm, in the order in which a step runs them.

    select -> shape_reward -> advantage -> token_weight -> importance -> loss -> after_update

An algorithm is a list of stages. Each stage implements the hooks it is about and leaves the others alone; a stage with
state keeps it in `state_dict`. `needs` declares the signals a stage reads, and nothing is computed unasked.
All hooks but `importance` and `loss` see the whole step (`RolloutTable`), identical on every rank, so results cannot
depend on the layout. These two see the targets of one micro-batch, whole rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from clipo_megatron.flow import RolloutTable


class Signal(str, Enum):
    """What a stage can ask the scoring forward for."""

    pooled_states = "pooled_states"  # mean response state of each rollout, feeds the contrastive head
    contrastive = "contrastive"  # table.signals["contrastive_loss"], ["contrastive_valid"]: [B]
    entropy = "entropy"  # per-token entropy of the policy
    reference_logprobs = "reference_logprobs"  # per token, and table.signals["kl"]: [B] float32, k1 / k2 / k3 sums


@dataclass(slots=True)
class TokenBatch:
    """The targets of one packed micro-batch, as the loss sees them. All [N]; gradients flow through `logprobs`
    (and `entropy` where asked for)."""

    logprobs: Tensor  # float32, under the policy being trained
    old_logprobs: Tensor  # float32, under the policy that was scored before the update
    advantages: Tensor  # float32
    weights: Tensor  # float32; the step's loss is sum(weights * per-token loss) over all ranks
    rollout: Tensor  # int64, which rollout of the micro-batch
    rollout_logprobs: Tensor  # float32, the engine's
    reference_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    importance: Tensor | None = None  # float32, multiplies the policy gradient; the product over stages
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalar sums weighted by `weights`, filled by losses


class Stage:
    """One part of an algorithm. Subclasses name their paper and assumptions in their docstring."""

    needs: frozenset[Signal] = frozenset()
    learns_without_advantage = False  # whether `loss` has a gradient where the advantage is 0
    holds_policy = False  # whether the policy waits in the next step, while this stage's own part learns

    def select(self, table: RolloutTable) -> Tensor | None:
        """Rows that train, [B] bool; None leaves all."""
        return None

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """New rewards [B] float32 from the rewards so far."""
        return reward

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor | None:
        """Advantages [B] float32; at most one stage of an algorithm gives them."""
        return None

    def token_weight(self, table: RolloutTable, rows: Tensor) -> Tensor | None:
        """Weight of each response token of every rollout, [B] float32, zero outside `rows` ([M] int64, one
        mini-batch); at most one stage gives them. Summed over all tokens of `rows` they are the loss's denominator."""
        return None

    def importance(self, tokens: TokenBatch) -> Tensor | None:
        """Factors [N] float32 of the policy-gradient term, without gradient; None for 1. Stages multiply."""
        return None

    def loss(self, tokens: TokenBatch) -> Tensor | None:
        """Per-token loss [N] float32, before weights; stages add up."""
        return None

    def after_update(self, table: RolloutTable) -> None:
        """After the policy's update: move state on."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
