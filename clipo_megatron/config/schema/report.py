"""The section `report`: what a run records and shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from clipo_megatron.config.ranges import within


class WandbMode(str, Enum):
    disabled = "disabled"  # nothing is recorded for it
    online = "online"
    offline = "offline"


@dataclass
class WandbConfig:
    """Weights & Biases; needs the package wandb."""

    mode: WandbMode = WandbMode.disabled  # whether, and how, metrics go there
    project: str = "clipo-megatron"  # project there
    run: Optional[str] = None  # name of the run there; null: name
    entity: Optional[str] = None  # user or team there; null: the account's default
    group: Optional[str] = None  # group there, for runs that differ in the seed; null: none


@dataclass
class ReportConfig:
    console: bool = True  # show every step's metrics in the terminal
    tensorboard: bool = False  # write metrics for TensorBoard too; needs the package tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)
    save_rollouts: int = within(1, 0)  # groups of each step whose texts are written to rollouts.jsonl; 0: none
    # rollouts of a recorded step whose pooled states and embeddings are kept for `clipo report`; 0: none
    save_states: int = within(256, 0)
    states_every: int = within(0, 0)  # steps between two recorded ones; the first and the last are always recorded
    measure_update_kl: bool = False  # measure how far a step moved the policy; costs one forward of its rollouts a step
    trace_every: int = within(10, 0)  # steps between two whose phases are traced on every rank; 0: none
    # alarm above this mean of exp(|log-prob of trainer - of engine|) over fresh rollouts; 1: they agree
    mult_prob_error_alarm: float = within(1.05, above=0)
    rollout_kl_alarm: float = within(0.05, above=0)  # alarm above this KL of engine and trainer, nats per token
    # alarm below this share of effective samples, where importance weights are corrected; 0: none
    effective_samples_alarm: float = within(0.5, 0, 1)
    alarm_stops: bool = False  # an alarm ends the run before the step's checkpoint; false: it warns
