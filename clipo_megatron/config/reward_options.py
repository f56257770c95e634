"""Options of the plug-ins that shape rewards or advantages: keyword arguments of their classes, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional


class Rewarded(str, Enum):
    correct = "correct"  # correct rollouts alone, as CLIPO does
    all = "all"  # wrong ones too


@dataclass
class AdoraOptions:
    weight: float = 0.1  # of the advantages of a group whose correct rollouts are not the longer ones
    emphasis: float = 1.0  # of the advantages of the other groups


@dataclass
class UnlikelinessOptions:
    beta: float = 0.25  # share of the reward that the likeliest rollout of a group loses


@dataclass
class GcpoOptions:
    pattern: str = "```python|<aux>"  # regular expression; a response that it is found in used the tool
    weight: float = 1.0  # of the reward for using the tool
    threshold: float = 0.0  # how much the accuracies with and without the tool must differ


@dataclass
class CgrpoOptions:
    alpha: float = 0.3  # share of a correct rollout's reward that its rubric score decides
    rubrics: str = "rubrics"  # key of extra_info with a row's rubrics, a list of texts to be found in the response
    ignore_case: bool = True
    score: Optional[str] = None  # a function of yours in place of rubrics: file.py:function, package.module:function


@dataclass
class GraceOptions:
    weight: float = 1.0  # of the whole, which is the whole reward in the source
    consistency: float = 0.2  # of the mean cosine to the group
    hardest: float = 0.2  # of the cosine to the nearest wrong rollout
    temperature: float = 0.1
    rewarded: Rewarded = Rewarded.correct
