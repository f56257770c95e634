"""DAPO: clip-higher, dynamic sampling, and a penalty on overlong responses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import HookContext, MethodOptions
from clipo_megatron.algorithms.methods.grpo import GRPO
from clipo_megatron.algorithms.policy_loss import PolicyLossSettings
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.ranges import within
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

CUSHION = 5  # Lmax / Lc of the paper: 20480 / 4096


@dataclass
class DapoOptions(MethodOptions):
    penalty: float = within(1.0, 0)  # weight of the soft penalty on overlong responses; 0: none
    longest: Optional[int] = within(None, 1)  # Lmax, length at which the penalty is -1; null: rollout.max_new_tokens
    cushion: Optional[int] = within(None, 1)  # Lc, tokens below Lmax at which it begins; null: Lmax / 5
    overlong_filter: bool = False  # leave truncated rollouts out of the loss; they still count in the group's mean

    def problems(self, config: RunConfig) -> Iterator[ConfigProblem]:
        window = config.rollout.max_new_tokens
        whole = window if self.longest is None else self.longest
        if not self.penalty:
            return
        if self.cushion is not None and self.cushion > whole:
            held = "rollout.max_new_tokens" if self.longest is None else "`longest`"
            reason = f"it begins so many tokens below {held} = {whole}, so every response would be penalised"
            yield ConfigProblem("cushion", reason, "Lower it, or set it to null for a fifth", self.cushion)
        elif (
            self.longest is not None and whole - (whole // CUSHION if self.cushion is None else self.cushion) >= window
        ):
            reason = f"no response is longer than rollout.max_new_tokens = {window}, so none would ever be penalised"
            yield ConfigProblem("longest", reason, "Lower it, or set it to null for rollout.max_new_tokens", whole)


class DAPO(GRPO):
    """arXiv 2503.14476, decoupled clip and dynamic sampling: GRPO's advantage with clip-higher (0.2 below, 0.28 above),
    a token mean over the whole mini-batch, and a soft penalty on the reward of overlong responses of length L,

        0 up to L = Lmax - Lc,   then (Lmax - Lc - L) / Lc,   -1 from Lmax on.

    Dynamic sampling, the fourth part, is rollout.max_refill_rounds, 9 by default with this method: the released script
    gives up after 10 batches. The paper samples 16 rollouts a prompt (rollout.samples_per_prompt), with Lmax = 20480
    and Lc = 4096; here Lmax is rollout.max_new_tokens and Lc a fifth of it unless they are given. The paper also
    reports leaving truncated rollouts out of the loss; its released script has the penalty alone, which is the default
    here.

    Assumes no KL term. CLIPO's bonus is added to the penalised reward.
    """

    source = "arXiv 2503.14476"
    summary = "clip-higher, dynamic sampling, penalty on overlong responses"
    options_class = DapoOptions
    default_clip = (0.2, 0.28)
    default_max_refill_rounds = 9

    def __init__(self, settings: PolicyLossSettings, options: DapoOptions | None = None):
        super().__init__(settings, options)
        self.longest = self.options.longest

    def bind(self, context: HookContext) -> None:
        if self.longest is None:
            self.longest = context.config.rollout.max_new_tokens

    def shape_reward(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """The penalised rewards, [B] float32.

        Raises:
            ValueError: neither the option `longest` nor a run says what Lmax is.
        """
        penalty, cushion = self.options.penalty, self.options.cushion
        if not penalty:
            return reward
        if self.longest is None:
            raise ValueError("DAPO knows no longest response: give it the option `longest`, or bind it to a run")
        cushion = max(self.longest // CUSHION, 1) if cushion is None else cushion
        over = (self.longest - cushion - table.response_length) / max(cushion, 1)
        return reward + penalty * torch.where(table.graded, over.clamp(-1, 0), 0.0)

    def select(self, table: RolloutTable, advantage: Tensor) -> Tensor | None:
        return ~table.truncated if self.options.overlong_filter else None
