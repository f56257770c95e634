"""Options of the plug-ins: keyword arguments of their classes, with defaults and ranges."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from clipo_megatron.config.ranges import within


class Rewarded(str, Enum):
    correct = "correct"  # correct rollouts alone, as CLIPO does
    all = "all"  # wrong ones too


@dataclass
class HapoOptions:
    weight: float = within(1.0, 0)  # of the length reward
    floor: float = within(-0.7, -1, 1)  # smallest length reward of a correct rollout


@dataclass
class UnlikelinessOptions:
    beta: float = within(0.25, 0, 1)  # share of the reward that the likeliest rollout of a group loses


@dataclass
class GcpoOptions:
    pattern: str = "```python|<aux>"  # regular expression; a response that it is found in used the tool
    weight: float = 1.0  # of the reward for using the tool
    threshold: float = within(0.0, 0, 1)  # how much the accuracies with and without the tool must differ


@dataclass
class CgrpoOptions:
    alpha: float = within(0.3, 0, 1)  # share of a correct rollout's reward that its rubric score decides
    rubrics: str = "rubrics"  # key of extra_info with a row's rubrics, a list of texts to be found in the response
    ignore_case: bool = True
    score: Optional[str] = None  # a function of yours in place of rubrics: file.py:function, package.module:function


@dataclass
class GraceOptions:
    weight: float = 1.0  # of the whole, which is the whole reward in the source
    consistency: float = within(0.2, 0)  # of the mean cosine to the group
    hardest: float = within(0.2, 0)  # of the cosine to the nearest wrong rollout
    temperature: float = within(0.1, 1e-6)
    rewarded: Rewarded = Rewarded.correct


@dataclass
class AdoraOptions:
    weight: float = within(0.1, 0)  # of the advantages of a group whose correct rollouts are not the longer ones
    emphasis: float = within(1.0, 0)  # of the advantages of the other groups


@dataclass
class CepoOptions:
    mix: float = within(0.5, 0, 1)  # l in the first step
    mix_steps: int = within(25, 1)  # over which l falls to 0
    clip: float = within(0.2, 1e-6)  # e, of exp(sign(A) D) around 1; the authors' script has 0.2, their text 0.5
    hint: str = "\nHint: the answer is {answer}."  # appended to the user's turn


class D3sScope(str, Enum):
    """Which rollouts compete."""

    batch = "batch"  # those of the whole step
    group = "group"  # those of each prompt


@dataclass
class D3sOptions:
    rollouts: float = within(0.5, 1e-6, 1)  # share that trains in the first step
    tokens: float = within(0.5, 1e-6, 1)  # share of their tokens that keeps its advantage in the first step
    scope: D3sScope = D3sScope.batch
    relax_steps: Optional[int] = within(None, 1)  # over which both shares rise to 1; None: the run's


@dataclass
class PipoOptions:
    window: int = within(8, 2)  # K, batches before this one whose mean rewards it is compared with
    negative: float = within(0.1, 0)  # factor of a step's outcome that is worse than theirs
    limit: float = within(5.0, 1e-6)  # deviations that an outcome counts for at most, either way


@dataclass
class PapoOptions:
    weight: float = within(0.01, 0)  # gamma, of KL(pi || pi_mask)
    mask: float = within(0.6, 1e-6, 1)  # share of the prompt's tokens that are masked
    limit: float = within(10.0, 1e-6)  # of the log ratio of one token, either way
    seed: int = within(0, 0)  # of the choice of masked tokens
