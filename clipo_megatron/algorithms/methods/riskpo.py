"""RiskPO: advantages from the lower tail and the middle range of the scores of bundles of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Optional

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import MethodOptions
from clipo_megatron.algorithms.methods.grpo import STD_EPSILON, group_statistics
from clipo_megatron.algorithms.policy_loss import ClippedPolicyLoss, PolicyLossSettings
from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.ranges import within
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import Experience, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_DEVIATION = 1e-3  # smaller ones do not scale: scores that are nearly equal say nothing about their spread


class BundleCredit(str, Enum):
    uniform = "uniform"  # every rollout of a bundle gets the bundle's advantage
    prompt_std = "prompt_std"  # divided by the deviation of the rewards of the rollout's own prompt


@dataclass
class RiskpoOptions(MethodOptions):
    bundle: int = within(5, 1)  # B, prompts of a bundle
    alpha: float = within(0.2, 0.001, 0.999)  # level of the lower quantile
    beta: float = within(0.9, 0.001, 0.999)  # level of the upper quantile
    tail: float = within(1.5, 0)  # omega, weight of the lower tail against 1 for the range between the quantiles
    rate: float = within(0.1, 0, 1)  # how far the quantiles move in a step
    start: Optional[float] = None  # both quantiles before the first step; null: those of the first step's scores
    by_std: bool = False  # divide by the deviation of the bundle's scores, as the released script does
    credit: BundleCredit = BundleCredit.uniform  # how a bundle's advantage is shared; the released script: prompt_std

    def problems(self, config: RunConfig) -> Iterator[ConfigProblem]:
        if self.alpha >= self.beta:
            reason = f"it is the lower level, and beta is {self.beta}"
            yield ConfigProblem("alpha", reason, "Lower it; 0.2 and 0.9 are usual", self.alpha)


class RiskPO(ClippedPolicyLoss):
    """arXiv 2510.00911: mixed value-at-risk of bundle scores.

    A bundle is B consecutive prompts of a step; its k-th score S is the sum of the rewards of the k-th rollout of each.
    With tracked quantiles q_a, q_b at the levels alpha < beta,

        RVaR part   [(S - q_a)+ - (S - q_b)+ + q_a - q_b] / (beta - alpha)
        CVaR part   -(q_a - S)+ / alpha
        A           (omega * CVaR part + RVaR part) / (omega + 1)

    for each rollout of the score: at most 0, and 0 from the upper quantile on. After a step each quantile moves by
    rate * (level - share of the step's scores below it). omega 1.5 and rate 0.1 are those of the released script. That
    also divides by the deviation of the bundle's scores and of the prompt's rewards (options `by_std`, `credit`), which
    the text does not; here deviations below 1e-3 divide nothing. Quantiles start at those of the first step's scores,
    where the script starts at 0 (option `start`).

    Where rollouts are missing (a last bundle of fewer prompts, ungraded rollouts) a score is B times the mean of those
    that are there. Assumes rewards of one scale over all prompts. CLIPO's bonus acts through the scores.
    """

    source = "arXiv 2510.00911"
    summary = "lower tail and middle range of the scores of bundles of prompts"
    options_class = RiskpoOptions
    needs_groups = False

    def __init__(self, settings: PolicyLossSettings, options: RiskpoOptions | None = None):
        super().__init__(settings, options)
        start = self.options.start
        self.levels = (self.options.alpha, self.options.beta)
        self.quantiles: list[float] | None = None if start is None else [start, start]
        self._scores = torch.zeros(0, dtype=torch.float64)  # of this step

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        bundle = self.options.bundle
        rows = table.graded.nonzero().squeeze(1)
        group = table.group[rows]
        number = torch.arange(rows.numel()) - torch.searchsorted(group, group)  # of the rollout within its group
        keys, place = torch.stack([group // bundle, number], 1).unique(dim=0, return_inverse=True)
        count = torch.bincount(place, minlength=len(keys))
        total = torch.zeros(len(keys), dtype=torch.float64).index_add(0, place, reward[rows].double())
        scores = self._scores = bundle * total / count.clamp(min=1)
        if self.quantiles is None and scores.numel():
            self.quantiles = torch.quantile(scores, torch.tensor(self.levels, dtype=torch.float64)).tolist()
        value = self._value(scores)
        if self.options.by_std:
            value = value / _scale(_deviation(scores, keys[:, 0]))
        advantage = torch.zeros(table.size, dtype=torch.float64).index_copy(0, rows, value[place])
        if self.options.credit is BundleCredit.prompt_std:
            advantage = advantage / _scale(group_statistics(reward, table)[1])
        return advantage.float()

    def _value(self, scores: Tensor) -> Tensor:
        """The advantage A of each score, float64."""
        if self.quantiles is None:
            return torch.zeros_like(scores)
        (low, high), (alpha, beta), tail = self.quantiles, self.levels, self.options.tail
        middle = ((scores - low).clamp(min=0) - (scores - high).clamp(min=0) + low - high) / (beta - alpha)
        return (tail * -(low - scores).clamp(min=0) / alpha + middle) / (tail + 1)

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        if self.quantiles is not None and self._scores.numel():
            for index, level in enumerate(self.levels):
                below = float((self._scores < self.quantiles[index]).double().mean())
                self.quantiles[index] += self.options.rate * (level - below)

    def state_dict(self) -> dict[str, Any]:
        return {"quantiles": None if self.quantiles is None else list(self.quantiles)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quantiles = None if state["quantiles"] is None else list(state["quantiles"])


def _deviation(values: Tensor, part: Tensor) -> Tensor:
    """The unbiased standard deviation of the values in each entry's part; 0 for a part of one."""
    count = torch.bincount(part)[part]
    sums = torch.zeros(int(part.max()) + 1 if part.numel() else 0, dtype=values.dtype)
    mean = sums.index_add(0, part, values)[part] / count
    return (sums.index_add(0, part, (values - mean).square())[part] / (count - 1).clamp(min=1)).sqrt()


def _scale(deviation: Tensor) -> Tensor:
    return torch.where(deviation > SMALLEST_DEVIATION, deviation + STD_EPSILON, 1.0)
