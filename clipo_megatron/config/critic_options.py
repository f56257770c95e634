"""Options of the baselines with a critic: keyword arguments of their classes, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass
class PpoOptions:
    lam: float = 0.95  # lambda of the generalised advantages
    critic_lam: Optional[float] = None  # lambda of the returns that the critic learns; None: as lam
    gamma: float = 1.0  # discount a token
    whiten: bool = True  # advantages to mean 0, variance 1 over the batch's tokens


@dataclass
class TppoOptions(PpoOptions):
    critic_learns_windows: bool = True  # false: windows that go on teach the critic nothing
