"""`clipo eval` on its ranks: evaluates a checkpoint's weights, and builds nothing that only training needs."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from clipo_megatron.checkpoint import CheckpointError, newest
from clipo_megatron.checkpoint.retention import defect
from clipo_megatron.config.errors import counted
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.evaluation.errors import EvaluationError
from clipo_megatron.evaluation.results import free_name, write_result
from clipo_megatron.evaluation.tables import left_out_lines, lines_of, result_table
from clipo_megatron.policy.policy import Policy
from clipo_megatron.rollout.engine import Cancelled
from clipo_megatron.runtime.manifest import read_manifest
from clipo_megatron.runtime.run_dir import CHECKPOINTS, EVAL_RESULTS
from clipo_megatron.training.policy_engine import PolicyEngine
from clipo_megatron.training.session import Session
from clipo_megatron.training.stop_signal import EvaluationStopped
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import read_config


def evaluate_run(config: RunConfig, *, checkpoint: Path | None = None, file: Path | None = None) -> None:
    """Evaluate a checkpoint of a run, print the figures and write the result; every rank calls it.

    The local engine can evaluate a named checkpoint while the run continues. Servers are the run's own.

    Args:
        config: of the run, with data.eval.
        checkpoint: None for the newest one, or the model itself if there is no checkpoint.
        file: where to write the result; None for train.output/results/step_<n>.json, or a free name beside it if that
            holds another result.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
        EvaluationError: no response could be graded.
        EvaluationStopped: a signal asked to end.
    """
    if checkpoint and (reason := defect(checkpoint)):
        raise CheckpointError(f"{checkpoint} is damaged: {reason}. Choose another checkpoint.")
    locks_output = checkpoint is None or config.rollout.engine is not EngineKind.local
    session = Session(config, locks_output=locks_output, judges_golds=True)
    with ExitStack() as opened:
        opened.callback(session.close)
        chosen = checkpoint or newest(session.output / CHECKPOINTS, session.reporter.say)
        step = steps_of(chosen, config) if chosen else 0
        engine = PolicyEngine(session, lambda: Policy(config, session.layout, weights=chosen))
        opened.callback(engine.close)
        engine.update_weights(step)
        problems, samples = len(session.eval_prompts), config.eval.samples
        size = f"{counted(problems, 'problem')} x {counted(samples, 'sample')}"
        session.reporter.say(f"evaluating {chosen or config.model.path}: {size}")
        try:
            result = replace(engine.evaluate(step), checkpoint=str(chosen or ""))
        except Cancelled:
            session.stop.on_any_rank()  # so that all ranks name the same signal
            raise EvaluationStopped(session.stop.signum) from None
        if session.is_main:
            lines = [*lines_of(result_table(result)), *left_out_lines(result)]
            print(f"{chosen or config.model.path}, {step} steps", *lines, sep="\n", flush=True)
            file = file or free_name(session.output / EVAL_RESULTS, result)
            write_result(file, result)
            print(file)
        if result.ungraded == 1.0:
            raise EvaluationError(
                "no response could be graded, so these figures say nothing of the model; the warning above says why. "
                "Mend what it names, or raise reward.deadline_s"
            )


def steps_of(checkpoint: Path, config: RunConfig) -> int:
    """The number of training steps that led to a checkpoint's weights.

    Raises:
        CheckpointError: the checkpoint is of another model than model.path. Where all weights have the same shapes,
            nothing else would notice.
    """
    manifest = read_manifest(checkpoint)
    mine = model_spec(read_config(hf_folder(config.model.path))).architecture()
    written = manifest.get("model") or {}
    differing = [name for name in mine if name in written and json.loads(json.dumps(mine[name])) != written[name]]
    if differing:
        facts = ", ".join(f"{name} {written[name]} in place of {mine[name]}" for name in differing)
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of model.path = {config.model.path}: it has {facts}. Give the model it was "
            "trained from, or another train.output to evaluate the model itself"
        )
    return int(manifest["step"])
