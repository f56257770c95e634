"""The limits that a healthy run stays within, and what it means when it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipo_megatron.config.schema import ReportConfig
from clipo_megatron.flow import StepReport


class AlarmError(RuntimeError):
    """A watched number left its limit and report.alarm_stops is true. The step's update has happened, and its
    checkpoint has not: the last one before it is the newest."""


@dataclass(frozen=True)
class Alarm:
    """One number beyond its limit."""

    step: int
    metric: str
    value: float
    setting: str  # of its limit
    limit: float
    look_at: str

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.metric} is {self.value:.4g}, beyond {self.setting} = {self.limit:g}: engine and "
            f"trainer disagree about the same tokens. Look at {self.look_at}"
        )


_WEIGHTS_FIRST = (
    "the weights first (rollout.sync.verify_every=1 compares them after each update), then at precision (the engine's "
    "dtype against model.dtype), chat template and sampling (rollout.top_p, rollout.top_k)"
)


def alarms(report: StepReport, config: ReportConfig) -> list[Alarm]:
    """Every watched number of the step that is beyond its limit, or not a number."""
    watched = (
        ("policy/mult_prob_error", "report.mult_prob_error_alarm", config.mult_prob_error_alarm),
        ("policy/rollout_kl", "report.rollout_kl_alarm", config.rollout_kl_alarm),
    )
    return [
        Alarm(report.step, metric, value, setting, limit, _WEIGHTS_FIRST)
        for metric, setting, limit in watched
        if (value := report.metrics.get(metric)) is not None and (math.isnan(value) or value > limit)
    ]


class NonFiniteError(RuntimeError):
    """Update after update is skipped because loss or gradient is not finite: the run learns nothing any more."""


def stop_on_skips(report: StepReport, skips: int) -> None:
    """End the run when more than `skips` updates in a row were skipped.

    Raises:
        NonFiniteError: they were; says what to look at, and where the run can go on from.
    """
    for room, rate in (("policy", "optimizer.learning_rate"), ("critic", "critic.learning_rate")):
        in_a_row = report.metrics.get(f"{room}/skipped_in_a_row", 0.0)
        if in_a_row > skips:
            raise NonFiniteError(
                f"step {report.step}: the last {in_a_row:.0f} updates were skipped because loss or gradient was not "
                f"finite (optimizer.max_skipped_updates = {skips}; {room}/loss is "
                f"{report.metrics.get(f'{room}/loss', math.nan):g}, {room}/grad_norm "
                f"{report.metrics.get(f'{room}/grad_norm', math.nan):g}). Nothing skipped has changed the weights. "
                f"Look at the model's dtype, {rate} and the rollouts of these steps; the same command goes on from the "
                "newest checkpoint"
            )


def stop_on(found: list[Alarm]) -> None:
    """End the run.

    Raises:
        AlarmError: there are alarms; names each, and where the run can go on from.
    """
    if found:
        raise AlarmError(
            "; ".join(map(str, found)) + ". The run stops before this step is saved (report.alarm_stops), so the "
            "newest checkpoint is from before it; the same command goes on from there, and report.alarm_stops=false "
            "turns alarms into warnings"
        )
