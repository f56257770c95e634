"""A control that reads no hidden state: likely correct responses get the bonus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms.clipo.reward import comparable, standardised_reward
from clipo_megatron.algorithms.hook import Hook, MethodOptions, Signal
from clipo_megatron.flow import RolloutTable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LikelihoodOptions(MethodOptions):
    weight: float = 0.2  # bonus of one standard deviation among a group's correct rollouts


class Likelihood(Hook):
    """A control: the bonus of a correct rollout is the mean log-prob of its tokens, under the policy that scored it,
    standardised among the correct ones of its group as clipo.bonus = ratio standardises: clipped at 2 deviations,
    centred, times `weight`.

    Paid where CLIPO pays at group level: in groups with two correct rollouts or more and a wrong one.
    """

    source = "control"
    summary = "bonus by the mean log-prob of the response"
    options_class = LikelihoodOptions
    needs = frozenset({Signal.logprob_sums})

    def bonus(self, table: RolloutTable) -> Tensor:
        score = table.signals["logprob_sum"].double() / table.response_length.clamp(min=1)
        return standardised_reward(score, comparable(table), table.group, weight=self.options.weight).float()
