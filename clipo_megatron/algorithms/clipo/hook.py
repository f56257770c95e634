"""CLIPO as a hook: the contrastive bonus is added to the rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.clipo.reward import contrastive_reward
from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.config.schema import ClipoConfig, ContrastiveLossName, Level
from clipo_megatron.flow import Experience, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class Clipo(Hook):
    """Adds the contrastive bonus to the reward of correct rollouts with a valid anchor (arXiv 2603.10101).

    During the first `warmup_steps` updates the head trains on the losses of the scoring forward, and the bonus is 0.
    With anchors = "wrong" no correct rollout has a loss, so no bonus is ever paid.
    """

    needs = frozenset({Signal.contrastive})

    def __init__(self, config: ClipoConfig) -> None:
        self.config = config
        self.updates = 0

    @property
    def warming_up(self) -> bool:
        """Whether the next update still belongs to the warm-up."""
        return self.updates < self.config.warmup_steps

    @property
    def freezes_policy(self) -> bool:  # type: ignore[override]
        """True in a warm-up in which the head trains alone."""
        return self.warming_up and not self.config.warmup_policy

    def bonus(self, table: RolloutTable) -> Tensor:
        """The contrastive bonus, [B] float32; zeros during the warm-up.

        Raises:
            ValueError: the table lacks the signals "contrastive_loss" and "contrastive_valid".
        """
        missing = [name for name in ("contrastive_loss", "contrastive_valid") if name not in table.signals]
        if missing:
            raise ValueError(
                f"the rollout table has no {' and no '.join(missing)}: the scoring forward must run the contrastive "
                "head, because this hook declares Signal.contrastive."
            )
        if self.warming_up:
            return torch.zeros_like(table.reward)
        return contrastive_reward(
            table.signals["contrastive_loss"].to(table.reward.dtype),
            table.signals["contrastive_valid"] & table.correct,
            weight=self.config.weight,
            floor=self.config.floor,
            constant=self.config.constant,
            calibrate=self.config.calibrate,
            group_sizes=self._positives(table) if self.config.calibrate else None,
        )

    def _positives(self, table: RolloutTable) -> Tensor:
        """How many correct rollouts there are where each rollout's positives come from, its group or the batch.

        [B] int64; 1 for soft_nn, from whose loss nothing is subtracted: at perfect separation it is 0, not
        ln(n_pos - 1).
        """
        if self.config.loss == ContrastiveLossName.soft_nn:
            return torch.ones_like(table.group)
        if self.config.level == Level.batch:
            return table.correct.sum().expand_as(table.group)
        return torch.bincount(table.group[table.correct], minlength=len(table.prompt_ids))[table.group]

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
