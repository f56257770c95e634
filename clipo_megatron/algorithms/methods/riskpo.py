"""Risk-based policy optimisation: advantages from the lower tail and the middle range of bundles' scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipo_megatron.algorithms.methods.grpo import STD_EPSILON, group_statistics
from clipo_megatron.algorithms.policy_loss import BaselineSettings, ClippedPolicyLoss
from clipo_megatron.config.baseline_options import BundleCredit
from clipo_megatron.flow import RolloutTable

EQUAL = 1e-3  # deviations below it do not scale: scores that are equal say nothing about their spread


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

    def __init__(
        self,
        settings: BaselineSettings,
        *,
        bundle: int = 5,
        alpha: float = 0.2,
        beta: float = 0.9,
        tail: float = 1.5,
        rate: float = 0.1,
        start: float | None = None,
        by_std: bool = False,
        credit: BundleCredit = BundleCredit.uniform,
    ):
        super().__init__(settings)
        self.bundle, self.levels, self.tail, self.rate = bundle, (alpha, beta), tail, rate
        self.by_std, self.credit = by_std, credit
        self.quantiles: list[float] | None = None if start is None else [start, start]
        self._scores = torch.zeros(0, dtype=torch.float64)  # of this step

    def advantage(self, table: RolloutTable, reward: Tensor) -> Tensor:
        """[B] float32; 0 where ungraded."""
        rows = table.graded.nonzero().squeeze(1)
        group = table.group[rows]
        number = torch.arange(rows.numel()) - torch.searchsorted(group, group)  # of the rollout within its group
        keys, place = torch.stack([group // self.bundle, number], 1).unique(dim=0, return_inverse=True)
        count = torch.bincount(place, minlength=len(keys))
        total = torch.zeros(len(keys), dtype=torch.float64).index_add(0, place, reward[rows].double())
        scores = self._scores = self.bundle * total / count.clamp(min=1)
        if self.quantiles is None and scores.numel():
            self.quantiles = torch.quantile(scores, torch.tensor(self.levels, dtype=torch.float64)).tolist()
        value = self._value(scores)
        if self.by_std:
            value = value / _scale(_deviation(scores, keys[:, 0]))
        advantage = torch.zeros(table.size, dtype=torch.float64).index_copy(0, rows, value[place])
        if self.credit is BundleCredit.prompt_std:
            advantage = advantage / _scale(group_statistics(reward, table)[1])
        return advantage.float()

    def _value(self, scores: Tensor) -> Tensor:
        """Of each score, float64."""
        if self.quantiles is None:
            return torch.zeros_like(scores)
        (low, high), (alpha, beta) = self.quantiles, self.levels
        middle = ((scores - low).clamp(min=0) - (scores - high).clamp(min=0) + low - high) / (beta - alpha)
        return (self.tail * -(low - scores).clamp(min=0) / alpha + middle) / (self.tail + 1)

    def after_update(self, table: RolloutTable) -> None:
        """Track the quantiles."""
        if self.quantiles is not None and self._scores.numel():
            for index, level in enumerate(self.levels):
                below = float((self._scores < self.quantiles[index]).double().mean())
                self.quantiles[index] += self.rate * (level - below)

    def state_dict(self) -> dict[str, Any]:
        """The quantiles."""
        return {"quantiles": None if self.quantiles is None else list(self.quantiles)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.quantiles = None if state["quantiles"] is None else list(state["quantiles"])


def _deviation(values: Tensor, part: Tensor) -> Tensor:
    """Unbiased standard deviation of the values of each entry's part; 0 for a part of one."""
    count = torch.bincount(part)[part]
    sums = torch.zeros(int(part.max()) + 1 if part.numel() else 0, dtype=values.dtype)
    mean = sums.index_add(0, part, values)[part] / count
    return (sums.index_add(0, part, (values - mean).square())[part] / (count - 1).clamp(min=1)).sqrt()


def _scale(deviation: Tensor) -> Tensor:
    return torch.where(deviation > EQUAL, deviation + STD_EPSILON, 1.0)
