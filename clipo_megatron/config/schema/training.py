"""The sections `optimizer`, `train`, `checkpoint`, `faults` and `eval`: the course of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from clipo_megatron.config.ranges import within

LARGEST_SEED = 2**32 - 1  # of NumPy
MOST_SAMPLES = 1000  # of a problem; beyond it, numbers of possible draws would overflow float64


class LearningRateSchedule(str, Enum):
    constant = "constant"  # as it is after the warm-up
    linear = "linear"  # falls in a line to the minimum at the last step
    cosine = "cosine"  # falls along half a cosine to the minimum at the last step


@dataclass
class OptimizerConfig:
    """AdamW of policy and critic."""

    learning_rate: float = within(1.0e-6, above=0, most=1)  # peak learning rate of the policy
    min_learning_rate: float = within(0.0, 0, 1)  # learning rate at the end of the schedules
    warmup_steps: int = within(0, 0)  # first steps, over which the learning rate rises from 0
    schedule: LearningRateSchedule = LearningRateSchedule.constant  # course of the learning rate after the warm-up
    weight_decay: float = within(0.01, 0)  # decoupled weight decay, as in AdamW
    beta1: float = within(0.9, 0, below=1)  # decay rate of the mean of gradients
    beta2: float = within(0.999, 0, below=1)  # decay rate of the mean of squared gradients
    epsilon: float = within(1.0e-8, above=0)  # added to the denominator of Adam
    max_grad_norm: float = within(1.0, above=0)  # larger gradients are scaled down to this norm
    max_skipped_updates: int = within(5, 0)  # updates skipped in a row (not finite) before the run ends
    # reduce gradients over replicas during the backward pass, and gather new weights during the next update's forward;
    # null: with more than one replica
    overlap_grad_reduce: Optional[bool] = None


@dataclass
class TrainConfig:
    steps: int = within(100, 1)  # each generates one batch of rollouts and learns from it
    seed: int = within(0, 0, LARGEST_SEED)  # seed of everything that is drawn at random
    output: str = "runs/${name}"  # folder for metrics, checkpoints and samples


@dataclass
class CheckpointConfig:
    every: int = within(50, 0)  # steps between two checkpoints; 0: only at the end
    at_end: bool = True  # save after the last step too; false: for runs that are only measured
    keep: int = within(2, 1)  # newest complete checkpoints that stay
    keep_every: int = within(0, 0)  # checkpoints of steps that are multiples of this are never removed; 0: no step
    keep_best: int = within(0, 0)  # this many evaluated checkpoints with the best held-out accuracy stay too
    asynchronous: bool = True  # copy to host memory, and write while training goes on; false: training waits
    deadline_s: float = within(1800.0, above=0)  # seconds to write one checkpoint
    max_failed_saves: int = within(3, 1)  # saves in a row that fail before the run ends; until then they are warnings
    resume: bool = True  # go on from the newest complete checkpoint in train.output; false: start over


@dataclass
class FaultsConfig:
    """What becomes of ranks that die or make no progress. `checkpoint` and `optimizer` say it of saves and updates."""

    # seconds without a heartbeat of a rank after which it is named and all ranks end
    heartbeat_timeout_s: float = within(60.0, least=1)
    # seconds in one phase of a step after which every rank prints its stacks; the run goes on
    phase_timeout_s: float = within(900.0, above=0)
    # seconds after a signal for rollouts to finish before the step is cancelled; null: 60, or see `clipo submit`
    grace_period_s: Optional[float] = within(None, 0)
    # starts of this machine's ranks after one has failed, in a row without a new checkpoint
    max_restarts: int = within(2, 0)


@dataclass
class EvalConfig:
    """How held-out problems are asked, during training and by `clipo eval`."""

    every: int = within(0, 0)  # steps between two evaluations; 0: only before and after training
    at_start: bool = True  # evaluate before the first step too
    samples: int = within(1, 1, MOST_SAMPLES, because="votes are counted exactly up to there")  # answers to a problem
    temperature: float = within(0.0, 0)  # 0: greedy
    top_p: float = within(1.0, above=0, most=1, because="it is a share of the probability mass")  # 1: off
    top_k: int = within(0, 0)  # likeliest tokens to draw from; 0: all
    ks: list[int] = field(default_factory=list)  # k of pass@k and maj@k; []: 1, 2, 4 and so on, up to eval.samples
    max_new_tokens: Optional[int] = within(None, 1)  # longest response, in tokens; null: rollout.max_new_tokens
    seed: Optional[int] = within(None, 0, LARGEST_SEED)  # seed of the draws; null: train.seed
