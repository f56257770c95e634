"""PIPO: repeat the previous step's update, weighed by how its outcome compares with those before."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.hook import HookContext, MethodOptions, Replay, TokenBatch
from clipo_megatron.algorithms.methods.cepo import GOLD, WRONG
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import Experience, MicroBatch, MiniBatch

# Signals of tokens that no loss reads: they are only needed for advantages and returns, which are known by then.
SPENT = frozenset({"entropy", "value", "next_value", GOLD, WRONG})


@dataclass
class PipoOptions(MethodOptions):
    window: int = within(8, 2)  # K, earlier batches whose mean rewards a batch is compared with
    negative: float = within(0.1, 0)  # factor of an outcome that is worse than theirs
    limit: float = within(5.0, 1e-6)  # standard deviations that an outcome counts for at most, either way


class PIPO(Replay):
    """arXiv 2604.00860, policy improvement: trains on the previous batch again, its advantages times phi = xi, or
    `negative` xi where xi < 0.

    xi = (mu_t - mean) / sigma compares the mean reward of this batch with those of the `window` batches before it;
    sigma is their unbiased deviation. xi is held within +-limit, which is our addition: few and equal means have a
    sigma near 0. With fewer than two batches, or phi = 0, nothing is repeated. The repetition comes after the update on
    this batch, with ratios to the policy that scored it then; KL and entropy terms act there too. mu is the mean shaped
    reward, in which CLIPO's bonus acts: the window begins anew when CLIPO's warm-up ends, because rewards with a bonus
    cannot be compared with those without. Assumes a base method that gives advantages. The previous batch is kept in
    host memory.
    """

    source = "arXiv 2604.00860"
    summary = "the previous batch again, by how its update did"
    options_class = PipoOptions

    def __init__(self, options: PipoOptions | None = None):
        super().__init__(options)
        self.means: list[float] = []  # mean rewards of earlier steps, at most `window`
        self.phi = 0.0  # of this step
        self.begins_anew = 0  # the step with the first bonus; 0: the first step, or there is no bonus

    def bind(self, context: HookContext) -> None:
        clipo = context.config.clipo
        self.begins_anew = clipo.warmup_steps if clipo.enabled else 0

    def replay(self, experience: Experience) -> Experience | None:
        """The previous step's experience, its advantages times phi."""
        mean = _mean_reward(experience)
        self.phi = 0.0 if mean is None else self._phi(mean, self._before(experience))
        return _with_advantages_times(self.previous, self.phi) if self.previous is not None and self.phi else None

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        if learned:
            mean, before = _mean_reward(experience), self._before(experience)
            self.means = before if mean is None else [*before, mean][-self.options.window :]
            self.previous = _host_copy(experience)

    def loss(self, tokens: TokenBatch) -> None:
        """Adds nothing to the loss, and reports phi as a metric."""
        tokens.metrics["pipo/phi"] = (tokens.weights * self.phi).sum()

    def _before(self, experience: Experience) -> list[float]:
        """The mean rewards that a step is compared with."""
        return [] if self.begins_anew and experience.table.step == self.begins_anew else self.means

    def _phi(self, mean: float, before: list[float]) -> float:
        if len(before) < 2:
            return 0.0
        gap, sigma = mean - statistics.fmean(before), statistics.stdev(before)
        if gap == 0:
            return 0.0
        limit = self.options.limit
        xi = gap / sigma if abs(gap) < limit * sigma else math.copysign(limit, gap)
        return xi if xi >= 0 else self.options.negative * xi

    def state_dict(self) -> dict[str, Any]:
        return {"means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = list(state["means"])


def _mean_reward(experience: Experience) -> float | None:
    """The mean shaped reward of the graded rollouts; None if there are none."""
    rewards = experience.reward[experience.table.graded]
    return float(rewards.double().mean()) if rewards.numel() else None


def _host_copy(experience: Experience) -> Experience:
    """A copy in host memory, without demonstrations and what only scoring and advantages needed."""

    def kept(micro: MicroBatch) -> MicroBatch:
        signals = {name: signal for name, signal in micro.signals.items() if name not in SPENT}
        return replace(micro, signals=signals, returns=None, advantages=None, weights=None).to(torch.device("cpu"))

    table = experience.table
    small = {name: signal for name, signal in table.signals.items() if signal.dim() == 1}
    batches = [MiniBatch(batch.rows, [kept(each) for each in batch.micro_batches]) for batch in experience.mini_batches]
    return replace(experience, mini_batches=batches, table=replace(table, signals=small), demonstrations={})


def _with_advantages_times(experience: Experience, phi: float) -> Experience:
    """A copy whose advantages are multiplied by phi."""

    def times(micro: MicroBatch) -> MicroBatch:
        if micro.token_advantages is None:
            return micro
        return replace(micro, token_advantages=phi * micro.token_advantages)

    batches = [
        MiniBatch(batch.rows, [times(each) for each in batch.micro_batches]) for batch in experience.mini_batches
    ]
    return replace(experience, mini_batches=batches, advantage=phi * experience.advantage)
