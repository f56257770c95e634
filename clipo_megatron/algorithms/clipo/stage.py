"""CLIPO as a stage: the bonus enters where rewards are shaped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipo_megatron.algorithms.clipo.reward import contrastive_reward
from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.config.schema import ClipoConfig, ContrastiveLossName, Level
from clipo_megatron.flow import RolloutTable


class Clipo(Hook):
    """Adds the contrastive bonus to the reward of correct rollouts with a valid anchor (arXiv 2603.10101).

    During the first `warmup_steps` updates the head trains, on the losses that the scoring forward gives, and the
    reward stays as it is. With anchors = "wrong" no correct rollout has a loss, so no bonus is ever paid.

    Attributes:
        last_bonus: [B] float32, what the last `shape_reward` added; zeros in the warm-up, None before the first step.
    """

    needs = frozenset({Signal.contrastive})

    def __init__(self, config: ClipoConfig) -> None:
        self.config = config
        self.updates = 0
        self.last_bonus: Tensor | None = None

    @property
    def warming_up(self) -> bool:
        """Whether the next update still belongs to the warm-up."""
        return self.updates < self.config.warmup_steps

    @property
    def holds_policy(self) -> bool:  # type: ignore[override]
        """In a warm-up in which the head trains alone."""
        return self.warming_up and not self.config.warmup_policy

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """`reward` [B] plus the bonus of each rollout.

        Raises:
            ValueError: the table lacks the signals "contrastive_loss" and "contrastive_valid".
        """
        missing = [name for name in ("contrastive_loss", "contrastive_valid") if name not in table.signals]
        if missing:
            raise ValueError(
                f"the rollout table has no {' and no '.join(missing)}: the scoring forward must run the contrastive "
                "head, because this stage declares Signal.contrastive."
            )
        if self.warming_up:
            self.last_bonus = torch.zeros_like(reward)
            return reward
        bonus = contrastive_reward(
            table.signals["contrastive_loss"].to(reward.dtype),
            table.signals["contrastive_valid"] & table.correct,
            weight=self.config.weight,
            floor=self.config.floor,
            constant=self.config.constant,
            calibrate=self.config.calibrate,
            group_sizes=self._positives(table) if self.config.calibrate else None,
        )
        self.last_bonus = bonus
        return reward + bonus

    def _positives(self, table: RolloutTable) -> Tensor:
        """[B] int64, correct rollouts in the set that an anchor's positives come from: its group or the batch.

        1 for soft_nn, whose loss is 0, not ln(n_pos - 1), at perfect separation: nothing is subtracted.
        """
        if self.config.loss == ContrastiveLossName.soft_nn:
            return torch.ones_like(table.group)
        if self.config.level == Level.batch:
            return table.correct.sum().expand_as(table.group)
        return torch.bincount(table.group[table.correct], minlength=len(table.prompt_ids))[table.group]

    def after_update(self, table: RolloutTable) -> None:
        """Count the update towards the warm-up."""
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """How many updates were made."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.updates = int(state["updates"])
