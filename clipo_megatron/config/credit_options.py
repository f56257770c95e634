"""Options of methods that compare whole rollouts, credit tokens, choose what trains, or train on more."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional


@dataclass
class CopgOptions:
    """Of CoPG."""

    beta: float = 0.1  # b, of log(pi / pi_ref) of a whole response; the source tunes it


@dataclass
class ConspoOptions:
    """Of ConSPO."""

    tau: float = 10.0  # scale of mean log-probs
    margin: float = 0.01  # nats a token by which correct rollouts shall lead
    margin_steps: int = 100  # over which the margin rises from 0; 0: it is there at once
    weigh_by_reward: bool = True  # correct rollouts count as 1 and what was added to their reward, at least 0


@dataclass
class CepoOptions:
    """Of CEPO."""

    mix: float = 0.5  # l in the first step
    mix_steps: int = 25  # over which l falls to 0
    clip: float = 0.2  # e, of exp(sign(A) D) around 1; the authors' script has 0.2, their text 0.5
    hint: str = "\nHint: the answer is {answer}."  # appended to the user's turn


class D3sScope(str, Enum):
    """Which rollouts compete."""

    batch = "batch"  # those of the whole step
    group = "group"  # those of each prompt


@dataclass
class D3sOptions:
    """Of D3S."""

    rollouts: float = 0.5  # share that trains in the first step
    tokens: float = 0.5  # share of their tokens that keeps its advantage in the first step
    scope: D3sScope = D3sScope.batch
    relax_steps: Optional[int] = None  # over which both shares rise to 1; None: the run's


@dataclass
class PipoOptions:
    """Of PIPO."""

    window: int = 8  # K, batches before this one whose mean rewards it is compared with
    negative: float = 0.1  # factor of a step's outcome that is worse than theirs
    limit: float = 5.0  # deviations that an outcome counts for at most, either way


@dataclass
class HptOptions:
    """Of HPT."""

    gate: int = 0  # correct rollouts of a group up to which it learns from its prompt's demonstration
    sft_weight: float = 1.0  # of a demonstration, beside 1 of a prompt's rollouts
    demonstration: Optional[str] = None  # key of extra_info; None: "solution", else a ground truth that is worked out
