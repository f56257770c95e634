"""Reports a run: metrics to their sinks, lines on the console, alarms, evaluations and the closing summary."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clipo_megatron.config.differences import plain
from clipo_megatron.config.errors import spell
from clipo_megatron.config.schema import RunConfig, WandbMode
from clipo_megatron.evaluation.comparing import refuse_other_problems
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.results import Evaluation, read_evaluations, remove_evaluations, write_evaluation
from clipo_megatron.evaluation.tables import progress_table, summary_line
from clipo_megatron.flow import StepReport
from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.runtime.run_dir import (
    CHECKPOINTS,
    EVALUATIONS,
    METRICS,
    ROLLOUTS,
    SEGMENTS,
    SETTINGS,
    TENSORBOARD,
    WANDB,
    newest_checkpoint,
)
from clipo_megatron.telemetry.alarms import alarms, stop_on, stop_on_skips
from clipo_megatron.telemetry.console import Progress, duration
from clipo_megatron.telemetry.segments import RunSegment, add_segment, changes, segment_before
from clipo_megatron.telemetry.sinks import JsonLines, Sink, TensorBoard, read_lines, writing
from clipo_megatron.telemetry.standstill import Standstill
from clipo_megatron.telemetry.wandb import Wandb


class Reporter:
    """Every rank has a reporter; that of the main rank writes and prints.

    Args:
        config: the configuration of the run.
        is_main: whether this is the main rank.
    """

    def __init__(self, config: RunConfig, *, is_main: bool):
        self.config, self.is_main = config, is_main
        self.output = Path(config.train.output)
        self.progress = Progress(config.train.steps, enabled=is_main and config.report.console)
        self.evaluations: list[Evaluation] = []
        self._standstill = Standstill(config)
        self._started = time.time()
        self._sinks: list[Sink] = []

    def say(self, message: str) -> None:
        """Print a line, on the main rank."""
        self.progress.say(message)

    @property
    def has_metrics(self) -> bool:
        """Whether an earlier session has logged steps; on the main rank."""
        return bool(read_lines(self.output / METRICS))

    def restore(self, step: int) -> None:
        """Read the evaluations of earlier sessions up to `step`, and remove later ones; collective.

        At step 0 all are removed: there is no checkpoint, so nothing shows that they are of this model.
        """
        if self.is_main:
            remove_evaluations(self.output / EVALUATIONS, after=step or -1)
        found = [read_evaluations(self.output / EVALUATIONS) if self.is_main else []]
        dist.broadcast_object_list(found, src=0)
        self.evaluations = found[0]

    def before(self, step: int) -> RunSegment | None:
        """The session that made the step before `step`, on the main rank; None if nothing is known about it."""
        return segment_before(self.output, step) if self.is_main else None

    def say_changes(self, before: RunSegment) -> None:
        """Print the settings that differ from those of a former session."""
        found = changes(before, plain(self.config))
        if not found:
            return
        self.say(f"settings that are not those of the steps before, {len(found)}:")
        width = max(len(each.key) for each in found)
        for each in found:
            self.say(f"  {each.key:<{width}}  before {spell(each.before)}, now {spell(each.now)}")

    def open(self, step: int, fingerprints: Mapping[str, Any] | None = None) -> None:
        """Open the logs for the steps from `step` on, and write down with which settings these are trained.

        Args:
            step: the steps that are done.
            fingerprints: what the settings stand for, on the main rank.
        """
        if self.is_main:
            settings = json.dumps(dataclasses.asdict(self.config), indent=1, default=str)
            if step < self.config.train.steps:  # a session that trains nothing is no segment of the run
                with writing(self.output / SEGMENTS):
                    add_segment(self.output, step, plain(self.config), fingerprints or {})
            with writing(self.output / SETTINGS):
                write_durably(self.output / SETTINGS, settings)
            self._sinks = [JsonLines(self.output / METRICS, from_step=step)]
            if self.config.report.tensorboard:
                self._sinks.append(TensorBoard(self.output / TENSORBOARD, from_step=step))
            if self.config.report.wandb.mode is not WandbMode.disabled:
                self._sinks.append(Wandb(self.config, self.output / WANDB, from_step=step))

    def step(self, report: StepReport) -> None:
        """Write a step's metrics to every sink, print its line, and warn of problems that they show.

        Raises:
            AlarmError: a metric is beyond its limit, and report.alarm_stops is true; on every rank.
            NonFiniteError: too many updates in a row were skipped; on every rank.
            ReportError: the metrics cannot be written.
        """
        for sink in self._sinks:
            sink.write(report)
        self.progress.step(report)
        for model, skipped in (("policy", "policy/update_skipped"), ("contrastive head", "clipo/update_skipped")):
            if count := report.metrics.get(skipped):
                self.say(
                    f"warning: step {report.step}: loss or gradient of the {model} was not finite; {count:.0f} of its "
                    "updates skipped"
                )
        stop_on_skips(report, self.config.optimizer.max_skipped_updates)
        if ungraded := report.metrics.get("reward/ungraded"):
            self.say(f"warning: step {report.step}: {ungraded:.1%} of the answers could not be graded")
        for line in self._standstill.warnings(report.step, report.metrics):
            self.say(line)
        found = alarms(report, self.config.report, ahead=self.config.rollout.ahead)
        if self.config.report.alarm_stops:
            stop_on(found)
        for alarm in found:
            self.say(f"warning: {alarm}")

    def record_evaluation(self, result: Evaluation) -> None:
        """Print an evaluation, and write it to a file."""
        self.evaluations.append(result)
        self.say(summary_line(result))
        if self.is_main:
            with writing(self.output / EVALUATIONS):
                write_evaluation(self.output / EVALUATIONS, result)

    def has_evaluation(self, step: int) -> bool:
        """Whether the policy after `step` steps was evaluated."""
        return any(each.step == step for each in self.evaluations)

    def accuracies(self) -> dict[int, float]:
        """Held-out accuracy of all evaluations so far, by step."""
        return {each.step: each.accuracy for each in self.evaluations}

    def close(self, step: int) -> None:
        """Close the logs, and print what was done and where everything is."""
        for sink in self._sinks:
            sink.close()
        spent = duration(time.time() - self._started)
        self.say(f"{step} of {self.config.train.steps} steps done, {spent} in this session")
        if len(self.evaluations) > 1:
            self._compare(self.evaluations[0], self.evaluations[-1])
        places = {"metrics": METRICS, "rollouts": ROLLOUTS, "evaluation": EVALUATIONS, "checkpoints": CHECKPOINTS}
        self.progress.paths({what: path for what, name in places.items() if (path := self.output / name).exists()})
        self._next_steps()

    def _next_steps(self) -> None:
        """Print the commands that a user is likely to want next."""
        clipo, output = command_of_clipo(), shlex.quote(str(self.output))
        self.say("next:")
        self.say(f"  {clipo} report {output} -o {shlex.quote(str(self.output / 'report.html'))}")
        if newest_checkpoint(self.output):
            problems = "" if self.config.data.eval else " 'data.eval=[{path: test.parquet}]'"
            self.say(f"  {clipo} eval {output}{problems}")
            self.say(f"  {clipo} convert to-hf {output} OUT")

    def _compare(self, first: Evaluation, last: Evaluation) -> None:
        """Print what training has changed, unless an earlier session had other problems under the same names."""
        try:
            refuse_other_problems(first, last, (f"step {first.step}", f"step {last.step}"))
        except EvaluationError as refusal:
            self.say(f"no comparison with the evaluation before: {refusal}")
            return
        headings, rows = progress_table(first, last)
        tested = " (p: exact McNemar test)" if any(row[-1] != "-" for row in rows) else ""
        title = f"Held-out problems after {first.step} and {last.step} steps, paired{tested}"
        self.progress.table(title, headings, rows)


def command_of_clipo() -> str:
    """What a shell in this folder calls `clipo` by: its name, or its place where PATH does not have the environment."""
    beside = Path(sys.executable).with_name("clipo")
    if shutil.which("clipo") or not beside.is_file():
        return "clipo"
    return shlex.quote(min(os.path.relpath(beside), str(beside), key=len))
