"""The sections `algorithm` and `critic`: the method, its losses, and the off-policy correction."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from clipo_megatron.config.ranges import within

_WEIGHT_ONE = "a token that trainer and engine find equally likely has weight 1, which must stay"


class CorrectionKind(str, Enum):
    none = "none"  # no importance weights
    truncate = "truncate"  # weights above the cap count as the cap
    mask = "mask"  # weights outside [floor, cap] count as 0


class CorrectionLevel(str, Enum):
    token = "token"  # the token's own ratio
    sequence = "sequence"  # product over a rollout's tokens
    geometric = "geometric"  # geometric mean over a rollout's tokens


class KLKind(str, Enum):
    k1 = "k1"  # log(pi / pi_ref)
    k2 = "k2"  # half its square
    k3 = "k3"  # pi_ref / pi - 1 + log(pi / pi_ref)


class KLPlace(str, Enum):
    loss = "loss"  # added to the loss of every token
    reward = "reward"  # subtracted from the reward


class Aggregation(str, Enum):
    token_mean = "token_mean"  # every response token of the mini-batch weighs the same
    sequence_mean = "sequence_mean"  # every rollout weighs the same, and its tokens share that weight
    constant = "constant"  # the sum over tokens, divided by a constant length (Dr. GRPO)


@dataclass
class KLConfig:
    """The term that keeps the policy near the reference policy, which is the one that the run began with."""

    coefficient: float = within(0.0, 0)  # 0: no such term, and no reference policy is kept for it
    kind: KLKind = KLKind.k3  # estimator of KL(pi || pi_ref) from a token's log-probs
    place: KLPlace = KLPlace.loss  # where it acts


@dataclass
class CorrectionConfig:
    """Importance weights for rollouts whose engine or weights differ from the policy that scores them."""

    kind: Optional[CorrectionKind] = None  # what becomes of large weights; null: truncate with rollout.ahead, else none
    level: CorrectionLevel = CorrectionLevel.token  # what a weight is computed over
    cap: float = within(2.0, 1, 1e8, because=_WEIGHT_ONE)  # largest weight
    floor: float = within(0.0, 0, 1, because=_WEIGHT_ONE)  # smallest weight; for kind mask


@dataclass
class PluginConfig:
    """A plug-in added to the base method."""

    name: str = "???"  # one of `clipo methods`, or a class of yours: file.py:Class, package.module:Class
    options: dict[str, Any] = field(default_factory=dict)  # the plug-in's own


@dataclass
class AlgorithmConfig:
    name: str = "grpo"  # a base method of `clipo methods`, or a class of yours: file.py:Class, package.module:Class
    options: dict[str, Any] = field(default_factory=dict)  # the base method's own
    plugins: list[PluginConfig] = field(default_factory=list)  # plug-ins added to it, in order
    clip_low: Optional[float] = within(None, 0)  # the ratio is held above 1 - this; null: the method's, 0.2 for most
    clip_high: Optional[float] = within(None, 0)  # the ratio is held below 1 + this; null: the method's, 0.2 for most
    # the loss of a token with a negative advantage A is at most -A times this, 3 in the released code; null: no limit
    dual_clip: Optional[float] = within(None, above=1)
    released_clamps: bool = False  # log ratios held within 20, and the value of KL's k3 within 10, as in released code
    aggregation: Optional[Aggregation] = None  # how tokens' losses are averaged; null: the method's
    constant_length: Optional[int] = within(None, 1)  # for aggregation constant; null: rollout.max_new_tokens
    entropy_coefficient: float = within(0.0, 0)  # weight of the entropy bonus in the loss
    mini_batches: int = within(1, 1)  # policy updates in one pass over the batch
    epochs: int = within(1, 1)  # passes over the batch
    kl: KLConfig = field(default_factory=KLConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)


@dataclass
class CriticConfig:
    """The value model of methods that need one, in the policy's layout. What is not here is as for the policy."""

    # Hugging Face folder or checkpoint that it starts from, without LM head; null: model.path
    path: Optional[str] = None
    learning_rate: float = within(1.0e-5, above=0, most=1)  # peak learning rate
    # how far a value may move from the scored one before its loss stops falling; null: no limit
    clip: Optional[float] = within(0.2, above=0, because="values could not move at all")
    epochs: Optional[int] = within(None, 1)  # passes over the batch; null: algorithm.epochs
    warmup_steps: int = within(0, 0)  # first steps, in which the critic learns and the policy waits
