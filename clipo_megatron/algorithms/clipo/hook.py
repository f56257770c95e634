"""CLIPO as a hook: the contrastive bonus is added to the rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.clipo.reward import compared, contrastive_reward, has_scores, standardised_reward
from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.config.schema import BonusForm, ClipoConfig, Level
from clipo_megatron.flow import Experience, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


class Clipo(Hook):
    """Pays the contrastive bonus to correct rollouts with a valid anchor (arXiv 2603.10101).

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
            ValueError: the table lacks the signals "contrastive_loss", "contrastive_valid", or, for forms of the bonus
                that are not made of the losses, "contrastive_score".
        """
        form, config = self.config.bonus, self.config
        scored = has_scores(form.value, config.loss.value)
        names = ["contrastive_loss", "contrastive_valid", *(["contrastive_score"] if scored else [])]
        missing = [name for name in names if name not in table.signals]
        if missing:
            raise ValueError(
                f"the rollout table has no {' and no '.join(missing)}: the scoring forward must run the contrastive "
                "head, because this hook declares Signal.contrastive."
            )
        if self.warming_up:
            return torch.zeros_like(table.reward)
        paid = table.signals["contrastive_valid"] & table.correct
        if scored:
            score = table.signals["contrastive_score"].to(table.reward.dtype)
            if form is BonusForm.expected:
                return torch.where(paid, score, 0.0)
            among = torch.zeros_like(table.group) if config.level is Level.batch else table.group
            return standardised_reward(score, paid, among, weight=config.weight)
        counts = compared(table.correct, table.group, config.level.value, config.loss.value)
        return contrastive_reward(
            table.signals["contrastive_loss"].to(table.reward.dtype),
            paid,
            weight=config.weight,
            floor=config.floor,
            constant=config.constant,
            calibrate=config.calibrate,
            group_sizes=counts if config.calibrate else None,
        )

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
