"""Options of the baselines that have some: keyword arguments of their classes, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional


class WhitenOver(str, Enum):
    tokens = "tokens"  # a rollout counts as often as it has tokens
    rollouts = "rollouts"  # every rollout counts once


class BundleCredit(str, Enum):
    uniform = "uniform"  # every rollout of a bundle gets the bundle's advantage
    prompt_std = "prompt_std"  # divided by the deviation of the rewards of the rollout's own prompt


@dataclass
class DapoOptions:
    penalty: float = 1.0  # weight of the soft penalty on overlong responses; 0: none
    longest: Optional[int] = None  # Lmax, tokens from which on it is -1; None: rollout.max_new_tokens (paper: 20480)
    cushion: Optional[int] = None  # Lc, tokens below Lmax at which it begins; None: Lmax / 5 (paper: 4096)
    overlong_filter: bool = False  # leave truncated rollouts out of the loss; they still count in the group's mean


@dataclass
class WhitenOptions:
    over: WhitenOver = WhitenOver.tokens  # what the batch's mean and deviation are over


@dataclass
class RiskpoOptions:
    bundle: int = 5  # B, prompts of a bundle
    alpha: float = 0.2  # level of the lower quantile
    beta: float = 0.9  # level of the upper quantile
    tail: float = 1.5  # omega, weight of the lower tail against 1 for the range between the quantiles
    rate: float = 0.1  # of tracking the quantiles, per step
    start: Optional[float] = None  # both quantiles before the first step; None: those of the first step's scores
    by_std: bool = False  # divide by the deviation of the bundle's scores, as the released script does
    credit: BundleCredit = BundleCredit.uniform  # the released script: prompt_std
