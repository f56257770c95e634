"""Policy improvement: the previous step's update once more, by how its outcome compares with those before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from clipo_megatron.algorithms.hook import Hook, HookContext, TokenBatch
from clipo_megatron.algorithms.methods.cepo import GOLD, WRONG
from clipo_megatron.flow import Experience, MicroBatch, MiniBatch

HOST = torch.device("cpu")
# Of the tokens' signals those that a loss never reads: they gave the advantages, which are held.
SPENT = frozenset({"entropy", "value", "next_value", "return", GOLD, WRONG})


class PIPO(Hook):
    """arXiv 2604.00860: trains on the previous batch again, its advantages times phi: xi, or `negative` xi below 0.

    xi = (mu_t - mean) / sigma: the mean reward of this batch against those of the `window` batches before it, sigma
    their unbiased deviation, xi held within +-limit, which is ours: few and equal means have a sigma near 0. Fewer than
    two batches, or phi = 0, repeat nothing. The repetition comes after the update on this batch, with the ratios to the
    policy that scored it then; KL and entropy terms act there too. mu is of the shaped reward, where CLIPO's bonus
    acts: the window begins anew when its warm-up ends, for rewards with a bonus are no worse than those without.
    Assumes a baseline that gives advantages. The previous batch is held in host memory.
    """

    replays = 1

    def __init__(self, *, window: int = 8, negative: float = 0.1, limit: float = 5.0):
        self.window, self.negative, self.limit = window, negative, limit
        self.means: list[float] = []  # of the steps before, at most `window`
        self.phi = 0.0  # of this step
        self.previous: Experience | None = None
        self.begins_anew = 0  # the step with the first bonus; 0: from the first on, or never

    def bind(self, context: HookContext) -> None:
        """When the bonus begins."""
        clipo = context.config.clipo
        self.begins_anew = clipo.warmup_steps if clipo.enabled else 0

    def replay(self, experience: Experience) -> Sequence[Experience]:
        """This step's, then that before."""
        mean = _mean(experience)
        self.phi = 0.0 if mean is None else self._phi(mean, self._before(experience))
        if self.previous is None or not self.phi:
            return [experience]
        return [experience, _weighed(self.previous, self.phi)]

    def learned(self, experience: Experience) -> None:
        """Its mean enters the window, and it is held for the next step."""
        mean, before = _mean(experience), self._before(experience)
        self.means = before if mean is None else [*before, mean][-self.window :]
        self.previous = _held(experience)

    def loss(self, tokens: TokenBatch) -> None:
        """Nothing; phi is reported."""
        tokens.metrics["pipo/phi"] = (tokens.weights * self.phi).sum()

    def _before(self, experience: Experience) -> list[float]:
        """The window that a step is compared with."""
        return [] if self.begins_anew and experience.table.step == self.begins_anew else self.means

    def _phi(self, mean: float, before: list[float]) -> float:
        if len(before) < 2:
            return 0.0
        gap, sigma = mean - statistics.fmean(before), statistics.stdev(before)
        if gap == 0:
            return 0.0
        xi = gap / sigma if abs(gap) < self.limit * sigma else math.copysign(self.limit, gap)
        return xi if xi >= 0 else self.negative * xi

    def state_dict(self) -> dict[str, Any]:
        """The window; the previous batch is kept by `policy.replay`."""
        return {"means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.means = list(state["means"])


def _mean(experience: Experience) -> float | None:
    """Of the rewards; None without a graded rollout."""
    rewards = experience.reward[experience.table.graded]
    return float(rewards.double().mean()) if rewards.numel() else None


def _held(experience: Experience) -> Experience:
    """In host memory, without what only scoring and credit needed of the table and of the tokens."""

    def held(micro: MicroBatch) -> MicroBatch:
        kept = {name: signal for name, signal in micro.signals.items() if name not in SPENT}
        return replace(micro, signals=kept, advantages=None, weights=None).to(HOST)

    table = experience.table
    small = {name: signal for name, signal in table.signals.items() if signal.dim() == 1}
    batches = [MiniBatch(batch.rows, [held(each) for each in batch.micro_batches]) for batch in experience.mini_batches]
    return replace(experience, mini_batches=batches, table=replace(table, signals=small))


def _weighed(experience: Experience, phi: float) -> Experience:
    def weighed(micro: MicroBatch) -> MicroBatch:
        if "advantage" not in micro.signals:
            return micro
        return replace(micro, signals={**micro.signals, "advantage": phi * micro.signals["advantage"]})

    batches = [
        MiniBatch(batch.rows, [weighed(each) for each in batch.micro_batches]) for batch in experience.mini_batches
    ]
    return replace(experience, mini_batches=batches, advantage=phi * experience.advantage, replayed=True)
