"""Options of the baselines whose loss is over tokens: keyword arguments of their classes, with defaults and ranges."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from clipo_megatron.config.ranges import within


class WhitenOver(str, Enum):
    tokens = "tokens"  # a rollout counts as often as it has tokens
    rollouts = "rollouts"  # every rollout counts once


class BundleCredit(str, Enum):
    uniform = "uniform"  # every rollout of a bundle gets the bundle's advantage
    prompt_std = "prompt_std"  # divided by the deviation of the rewards of the rollout's own prompt


@dataclass
class DapoOptions:
    penalty: float = within(1.0, 0)  # weight of the soft penalty on overlong responses; 0: none
    longest: Optional[int] = within(None, 1)  # Lmax, tokens where it is -1; None: rollout.max_new_tokens; paper: 20480
    cushion: Optional[int] = within(None, 1)  # Lc, tokens below Lmax at which it begins; None: Lmax / 5; paper: 4096
    overlong_filter: bool = False  # leave truncated rollouts out of the loss; they still count in the group's mean


@dataclass
class WhitenOptions:
    over: WhitenOver = WhitenOver.tokens  # what the batch's mean and deviation are over


@dataclass
class RiskpoOptions:
    bundle: int = within(5, 1)  # B, prompts of a bundle
    alpha: float = within(0.2, 0.001, 0.999)  # level of the lower quantile
    beta: float = within(0.9, 0.001, 0.999)  # level of the upper quantile
    tail: float = within(1.5, 0)  # omega, weight of the lower tail against 1 for the range between the quantiles
    rate: float = within(0.1, 0, 1)  # of tracking the quantiles, per step
    start: Optional[float] = None  # both quantiles before the first step; None: those of the first step's scores
    by_std: bool = False  # divide by the deviation of the bundle's scores, as the released script does
    credit: BundleCredit = BundleCredit.uniform  # the released script: prompt_std


@dataclass
class PpoOptions:
    lam: float = within(0.95, 0, 1)  # lambda of the generalised advantages
    critic_lam: Optional[float] = within(None, 0, 1)  # lambda of the returns that the critic learns; None: as lam
    gamma: float = within(1.0, 0, 1)  # discount a token
    whiten: bool = True  # advantages to mean 0, variance 1 over the batch's tokens


@dataclass
class TppoOptions(PpoOptions):
    critic_learns_windows: bool = True  # false: windows that go on teach the critic nothing


@dataclass
class HptOptions:
    gate: int = within(0, 0)  # correct rollouts of a group up to which it learns from its prompt's demonstration
    sft_weight: float = within(1.0, 0)  # of a demonstration, beside 1 of a prompt's rollouts
    demonstration: Optional[str] = None  # key of extra_info; None: "solution", else a ground truth that is worked out
