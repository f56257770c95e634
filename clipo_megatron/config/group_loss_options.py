"""Options of the baselines whose loss is over groups: keyword arguments of their classes, with defaults and ranges."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from clipo_megatron.config.ranges import within


class DiscoScore(str, Enum):
    log_likelihood = "log_likelihood"  # mean log-prob of the response's tokens
    likelihood_ratio = "likelihood_ratio"  # mean ratio to the policy that was scored


class Penalty(str, Enum):
    squared = "squared"
    linear = "linear"


@dataclass
class DiscoOptions:
    score: DiscoScore = DiscoScore.log_likelihood
    tau: Optional[float] = within(None, 1e-6)  # of log-mean-exp over wrong ones; None: 10 for log_likelihood, else 1
    beta: float = within(1.0e3, 0)  # of the penalty on KL(old || new)
    delta: float = within(1.0e-4, 0)  # KL without penalty, nats a token
    penalty: Penalty = Penalty.linear  # of the KL beyond delta
    weigh_by_reward: bool = True  # correct rollouts count as 1 and what was added to their reward, at least 0


@dataclass
class CopgOptions:
    beta: float = within(0.1, 1e-6)  # b, of log(pi / pi_ref) of a whole response; the source tunes it


@dataclass
class ConspoOptions:
    tau: float = within(10.0, 1e-6)  # scale of mean log-probs
    margin: float = 0.01  # nats a token by which correct rollouts shall lead
    margin_steps: int = within(100, 0)  # over which the margin rises from 0; 0: it is there at once
    weigh_by_reward: bool = True  # correct rollouts count as 1 and what was added to their reward, at least 0
