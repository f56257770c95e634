"""The section `clipo`: the contrastive head and its reward (arXiv 2603.10101)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clipo_megatron.config.ranges import within


class HeadKind(str, Enum):
    linear = "linear"  # hidden size -> dim, without bias
    mlp = "mlp"  # hidden size -> hidden size -> dim, ReLU


class ContrastiveLossName(str, Enum):
    infonce = "infonce"  # one positive, drawn at random
    supcon_out = "supcon_out"  # mean over the positives outside the logarithm
    supcon_in = "supcon_in"  # mean over the positives inside the logarithm
    soft_nn = "soft_nn"  # sum over the positives inside the logarithm


class Level(str, Enum):
    group = "group"  # positives and negatives from the prompt's own group
    batch = "batch"  # both from the whole batch
    cross = "cross"  # positives from the group, negatives all other rollouts of the batch, as in the released code
    cross_opposite = "cross_opposite"  # positives from the group, negatives of the other verdict from the batch


class Similarity(str, Enum):
    cosine = "cosine"
    neg_cosine = "neg_cosine"  # minus the cosine
    l2 = "l2"  # 1 - distance


class Anchors(str, Enum):
    correct = "correct"  # correct rollouts
    wrong = "wrong"  # wrong rollouts
    both = "both"  # all graded rollouts


class BonusForm(str, Enum):
    paper = "paper"  # max(constant - weight * loss, floor)
    expected = "expected"  # the mean of that over the positives in place of one drawn
    ratio = "ratio"  # how far positives are nearer than negatives, standardised among a prompt's correct rollouts


class BonusPlace(str, Enum):
    reward = "reward"  # before advantages are computed
    advantage = "advantage"  # after they are computed


class Debias(str, Enum):
    none = "none"  # states as they are
    mean = "mean"  # subtract the batch mean of the pooled states
    layer_norm = "layer_norm"  # normalise each pooled state to mean 0, variance 1


@dataclass
class ClipoConfig:
    enabled: bool = True  # train the head and add its bonus to rewards
    head: HeadKind = HeadKind.linear  # what maps a rollout's pooled state to its embedding
    dim: int = within(512, 1)  # size of an embedding
    loss: ContrastiveLossName = ContrastiveLossName.infonce  # contrastive loss of an anchor
    level: Level = Level.group  # where positives and negatives come from
    released_eps: bool = False  # add 1e-8 to sums of exponentials, as the released code does
    similarity: Similarity = Similarity.cosine  # similarity of two embeddings
    temperature: float = within(0.05, above=0)  # similarities are divided by it
    anchors: Anchors = Anchors.correct  # rollouts that have a loss; a bonus is paid to correct ones alone
    weight: float = within(0.2, -10)  # lambda: the bonus is max(constant - lambda * loss, floor); below 0 a control
    floor: float = within(-0.5, most=0, because="every valid rollout would get a reward for nothing")  # smallest bonus
    constant: float = 0.0  # added to the bonus before the floor
    calibrate: bool = False  # subtract the loss of perfect separation before it is weighed
    bonus: BonusForm = BonusForm.paper  # how the bonus is made
    place: BonusPlace = BonusPlace.reward  # what the bonus is added to, that of plug-ins too
    debias: Debias = Debias.none  # what is taken out of pooled states before the head
    learning_rate: float = within(1.0e-3, above=0, most=1)  # learning rate of the head
    weight_decay: float = within(0.01, 0)  # weight decay of the head
    warmup_steps: int = within(0, 0)  # first steps, in which the head trains and gives no bonus
    warmup_policy: bool = True  # whether the policy trains, on the plain reward, during the warm-up
    frozen: bool = False  # keep the head at its random initialisation
