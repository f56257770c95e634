"""Limits of metrics in a healthy run, and the errors that end a run which leaves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipo_megatron.config.schema import ReportConfig
from clipo_megatron.flow import StepReport
from clipo_megatron.telemetry.metric_names import AGE_MAX, AGE_MEAN, EFFECTIVE_SAMPLES

MISMATCH = "policy/mult_prob_error"


class AlarmError(RuntimeError):
    """A metric is beyond its limit, and report.alarm_stops is true.

    The step's update has happened, but its checkpoint has not been saved: the newest one is from before the step.
    """


@dataclass(frozen=True)
class Alarm:
    """A metric beyond its limit."""

    step: int
    metric: str
    value: float
    setting: str  # key of the limit
    limit: float
    advice: str  # what it means, and what to look at

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.metric} is {self.value:.4g}, beyond {self.setting} = {self.limit:g}: "
            f"{self.advice}"
        )


_DISAGREEMENT = (
    "engine and trainer disagree about the same tokens. Look at the weights first (rollout.sync.verify_every=1 "
    "compares them after each update), then at precision (the engine's dtype against model.dtype) and chat template"
)
_FEW_SAMPLES = (
    "the policy has moved so far from the one that drew the tokens that few of them count. Look at the ages "
    f"({AGE_MEAN}) and at {MISMATCH}: lower rollout.ahead or optimizer.learning_rate"
)
_TOO_OLD = (
    "tokens trained that are older than rollout.ahead allows, which is a bug of the collection. Report it with "
    "prompts.jsonl and rollouts.jsonl of the run; rollout.ahead=0 avoids it"
)


def alarms(report: StepReport, config: ReportConfig, *, ahead: int = 0) -> list[Alarm]:
    """The alarms of a step: every watched metric that is beyond its limit, or not a number.

    `ahead` is the largest age of a token where ages are measured.
    """
    watched = (
        (MISMATCH, "report.mult_prob_error_alarm", config.mult_prob_error_alarm, 1, _DISAGREEMENT),
        ("policy/rollout_kl", "report.rollout_kl_alarm", config.rollout_kl_alarm, 1, _DISAGREEMENT),
        (EFFECTIVE_SAMPLES, "report.effective_samples_alarm", config.effective_samples_alarm, -1, _FEW_SAMPLES),
        (AGE_MAX, "rollout.ahead", ahead, 1, _TOO_OLD),
    )
    return [
        Alarm(report.step, metric, value, setting, limit, advice)
        for metric, setting, limit, sign, advice in watched  # sign -1: the limit is the smallest value
        if (value := report.metrics.get(metric)) is not None and (math.isnan(value) or sign * value > sign * limit)
    ]


class NonFiniteError(RuntimeError):
    """Too many updates in a row were skipped because loss or gradient was not finite: the run has stopped learning."""


def stop_on_skips(report: StepReport, skips: int) -> None:
    """End the run if more than `skips` updates in a row were skipped.

    Raises:
        NonFiniteError: says what to look at, and where the run can resume.
    """
    for model, rate in (("policy", "optimizer.learning_rate"), ("critic", "critic.learning_rate")):
        in_a_row = report.metrics.get(f"{model}/skipped_in_a_row", 0.0)
        if in_a_row > skips:
            raise NonFiniteError(
                f"step {report.step}: the last {in_a_row:.0f} updates were skipped because loss or gradient was not "
                f"finite (optimizer.max_skipped_updates = {skips}; {model}/loss is "
                f"{report.metrics.get(f'{model}/loss', math.nan):g}, {model}/grad_norm "
                f"{report.metrics.get(f'{model}/grad_norm', math.nan):g}). Skipped updates change nothing. "
                f"Look at the model's dtype, {rate} and the rollouts of these steps; the same command resumes from the "
                "newest checkpoint"
            )


def stop_on(found: list[Alarm]) -> None:
    """End the run if there are alarms.

    Raises:
        AlarmError: names each alarm, and says where the run can resume.
    """
    if found:
        raise AlarmError(
            "; ".join(map(str, found)) + ". The run stops before this step is saved (report.alarm_stops), so the "
            "newest checkpoint is from before it; the same command resumes from there, and report.alarm_stops=false "
            "turns alarms into warnings"
        )
