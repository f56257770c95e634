"""Decoupled clip and dynamic sampling policy optimisation."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import HookContext
from clipo_megatron.algorithms.methods.grpo import GRPO
from clipo_megatron.algorithms.policy_loss import BaselineSettings
from clipo_megatron.flow import RolloutTable

CUSHION = 5  # Lmax / Lc of the paper: 20480 / 4096


class DAPO(GRPO):
    """arXiv 2503.14476: GRPO's advantage with clip-higher (0.2 below, 0.28 above), a token mean over the whole
    mini-batch, and a soft penalty on the reward of overlong responses,

        0 up to L = Lmax - Lc,   then (Lmax - Lc - L) / Lc,   -1 from Lmax on.

    Dynamic sampling, the fourth part, is rollout.max_refill_rounds, 9 by default with this method: the released script
    gives up after 10 batches. The paper samples 16 rollouts a prompt (rollout.samples_per_prompt), Lmax = 20480 and
    Lc = 4096; here Lmax is rollout.max_new_tokens and Lc a fifth of it unless they are given. The paper also reports
    leaving truncated rollouts out of the loss; its released script has the penalty alone, which is the default.

    Assumes no KL term. CLIPO's bonus is added to the penalised reward.
    """

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        penalty: float = 1.0,
        longest: int | None = None,
        cushion: int | None = None,
        overlong_filter: bool = False,
    ):
        super().__init__(settings)
        self.penalty, self.longest, self.cushion, self.overlong_filter = penalty, longest, cushion, overlong_filter

    def bind(self, context: HookContext) -> None:
        """The run's longest response is Lmax where none was given."""
        if self.longest is None:
            self.longest = context.config.rollout.max_new_tokens

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32.

        Raises:
            ValueError: it was neither given Lmax nor bound to a run.
        """
        if not self.penalty:
            return reward
        if self.longest is None:
            raise ValueError("DAPO knows no longest response: give it the option `longest`, or bind it to a run")
        cushion = max(self.longest // CUSHION, 1) if self.cushion is None else self.cushion
        over = (self.longest - cushion - table.response_length) / max(cushion, 1)
        return reward + self.penalty * torch.where(table.graded, over.clamp(-1, 0), 0.0)

    def select(self, table: RolloutTable, advantage: Tensor) -> Tensor | None:
        """All, or those that ended by themselves."""
        return ~table.truncated if self.overlong_filter else None
