"""A training run on one rank: its parts, built from the configuration, and what happens around the steps."""

from __future__ import annotations

import random
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import Signal
from clipo_megatron.algorithms.methods.registry import max_refill_rounds
from clipo_megatron.checkpoint import CheckpointContents, CheckpointError, CheckpointItem, Checkpoints
from clipo_megatron.checks.method import build_method
from clipo_megatron.config.errors import counted
from clipo_megatron.config.model_folder import CRITIC, POLICY
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.replay import ReplayCheckpointer
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.rollout.engine import TOP_P_CANDIDATES, Cancelled, Routing, SamplingParams
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.run_dir import CHECKPOINTS, set_aside, step_of
from clipo_megatron.telemetry.segments import refusals, remarks
from clipo_megatron.training.collector import Collector
from clipo_megatron.training.fingerprints import fingerprints
from clipo_megatron.training.policy_engine import PolicyEngine
from clipo_megatron.training.recorder import Recorder
from clipo_megatron.training.session import Session
from clipo_megatron.training.stop_signal import Stopped
from clipo_megatron.weights.formats.source import sidecar_files
from clipo_megatron.weights.spec import ModelSpec


class Run:
    """The parts of a run on one rank. Constructing it is collective: the policy is built and loaded."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.session = session = Session(config)
        self.reporter = session.reporter
        self.train_prompts = session.problems.training(session.held_out)
        self._fingerprints = (
            fingerprints(config, session.tokenizer, train=self.train_prompts, held_out=session.held_out)
            if session.is_main
            else {}
        )
        self.sampler = PromptSampler(
            len(self.train_prompts), config.data.prompts_per_step, seed=config.train.seed, shuffle=config.data.shuffle
        )
        self.algorithm = build_method(config, session.tokenizer, self.train_prompts, session.stop_ids)
        needs, updates = self.algorithm.needs, policy_updates(config, self.algorithm)
        with ExitStack() as opened:  # closes what was opened if something later fails
            self.engine = PolicyEngine(
                session, lambda: PolicyActor(config, session.layout, needs=needs, total_steps=updates)
            )
            opened.callback(self.engine.close)
            self.actor = self.engine.policy
            self.recorder = Recorder(config, session.layout, self.actor)
            opened.callback(self.recorder.close)
            self.collector = Collector(
                config.rollout,
                self.engine.source,
                self.engine.graders,
                prompts=self.train_prompts,
                sampler=self.sampler,
                sampling=sampling_params(config, session.stop_ids, self.actor.spec),
                max_refill_rounds=max_refill_rounds(config),
                progress=self.reporter.progress.rollouts,
            )
            self.checkpoints = Checkpoints(
                session.output / CHECKPOINTS,
                self._checkpoint_contents(),
                config.checkpoint,
                say=self.reporter.say,
                accuracy=self.reporter.accuracies,
            )
            for each in (self.actor, *([self.actor.critic] if self.actor.critic else [])):
                each.trainable.pre_mutation_hook = self.checkpoints.wait_for_snapshot
            self._opened = opened.pop_all()

    def _checkpoint_contents(self) -> CheckpointContents:
        config, actor, layout, is_main = self.config, self.actor, self.session.layout, self.session.is_main
        items = [
            CheckpointItem("sampler", self.sampler, writes=is_main),
            CheckpointItem("algorithm", self.algorithm, writes=is_main),
            CheckpointItem("rollouts", self.collector, writes=is_main, gathers=True, optional=True),
            CheckpointItem("rng", RngState(), per_rank=True),
        ]
        if actor.contrastive is not None:
            items.append(CheckpointItem("contrastive", actor.contrastive, writes=layout.leads_its_stage))
        if self.algorithm.replays:
            replays = ReplayCheckpointer(self.algorithm, actor.batcher)
            items.append(CheckpointItem("replay", replays, writes=is_main, gathers=True))
        models, critic, clipo = {POLICY: TrainableCheckpointer(actor.trainable)}, actor.critic, config.clipo
        if critic:
            models[CRITIC] = TrainableCheckpointer(critic.trainable)
        facts = {
            "model": actor.spec.architecture(),
            "algorithm": list(self.algorithm.state_dict()),
            "contrastive head": {"kind": clipo.head.value, "dim": clipo.dim} if clipo.enabled else None,
            "critic": critic.spec.architecture() if critic else None,
            "layout": {"tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "dp": layout.dp, "ep": layout.division.ep},
        }
        return CheckpointContents(items, models, facts, sidecar_files(config.model.path) if is_main else {})

    def restore(self) -> int:
        """Load the newest checkpoint if there is one, and give the engine the policy's weights; collective.

        With checkpoint.resume = false, what earlier runs left in the output folder is moved aside instead.

        Returns:
            The number of steps done.
        """
        step, output, is_main = 0, self.session.output, self.session.is_main
        if not self.config.checkpoint.resume:
            if is_main and (previous := set_aside(output)):
                self.reporter.say(f"starting over: the results of the run before are in {previous}")
        elif newest := self.checkpoints.latest():
            self._compare_with_steps_before(step_of(newest))
            step = self.checkpoints.load(newest)
            self.reporter.say(f"resumed from {newest}, {step} steps done")
        elif is_main and self.reporter.has_metrics:
            self.reporter.say(f"{output} has metrics but no checkpoint: starting from the beginning")
        self.reporter.restore(step)
        self.engine.update_weights(step)
        return step

    def _compare_with_steps_before(self, step: int) -> None:
        """Say what has changed since the steps up to `step`; collective.

        Raises:
            CheckpointError: on every rank, because the run cannot go on with what has changed.
        """
        found: list[list[str]] = [[]]
        if (before := self.reporter.before(step)) is not None:
            self.reporter.say_changes(before)
            for remark in remarks(before.fingerprints, self._fingerprints):
                self.reporter.say(f"warning: {remark}")
            found = [refusals(before.fingerprints, self._fingerprints)]
        dist.broadcast_object_list(found, src=0)
        if found[0]:
            raise CheckpointError(f"this run cannot be resumed: {' '.join(found[0])}")

    def before_training(self, step: int) -> None:
        """Open the logs, and evaluate the policy if that is due and was not done; collective."""
        config, layout = self.config, self.session.layout
        self.reporter.open(step, self._fingerprints)
        self.recorder.open(step)
        self.reporter.say(
            f"{config.name}: {Path(config.model.path).name}, {len(self.train_prompts)} problems, "
            f"{config.data.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples a step, "
            f"{counted(layout.world, 'rank')} ({layout})"
        )
        due = config.eval.at_start if step == 0 else is_due(config.eval.every, step)
        if step >= config.train.steps:
            self.reporter.say(f"nothing to train: {step} steps are done; to continue, set train.steps higher than that")
        elif due and not self._is_evaluated(step) and not self.session.stop.on_any_rank():
            self.evaluate(step)

    def after_step(self, step: int) -> None:
        """Save and evaluate where that is due after `step` steps; collective."""
        self.checkpoints.poll()
        if is_due(self.config.checkpoint.every, step):
            self.save(step)
        if is_due(self.config.eval.every, step):
            self.evaluate(step)

    def after_training(self, step: int) -> None:
        """Save, evaluate, and print where everything is; collective.

        Raises:
            Stopped: steps are left, or the last evaluation.
        """
        finished = step >= self.config.train.steps
        if not self.checkpoints.has(step) and (self.config.checkpoint.at_end or not finished):
            self.save(step, resync=finished)
        if finished and not self._is_evaluated(step):
            with suppress(Cancelled):
                self.evaluate(step)
            finished = self._is_evaluated(step)
        self.session.heartbeat.phase("checkpoint")
        self.checkpoints.wait(last=True)
        self.session.heartbeat.stop()
        self.recorder.close()
        # What ended the last evaluation may be known to one rank only. No rank ends before, for one holds the store.
        self.session.stop.on_any_rank()
        self.reporter.close(step)
        if not finished:
            raise Stopped(step, self.config.train.steps, self.session.stop.signum)

    def evaluate(self, step: int) -> None:
        """Evaluate the policy on the held-out problems, if there are any, and report it; collective.

        Raises:
            Cancelled: on every rank, because the run is to end and the answers took too long.
        """
        if self.session.eval_prompts:
            self.collector.open.stop()  # the engine would yield groups of the next step too
            self.reporter.record_evaluation(self.engine.evaluate(step))

    def save(self, step: int, *, resync: bool = True) -> None:
        """Save a checkpoint; collective. Colocated servers give up their memory for it, and with `resync` they get it
        and the weights again."""
        self.session.heartbeat.phase("checkpoint")
        self.engine.offload()
        self.checkpoints.save(step)
        if self.config.rollout.colocated and resync:
            self.engine.resync()

    def close(self) -> None:
        """Close everything, after waiting for a checkpoint that is being written; calling it again does nothing."""
        self.session.heartbeat.stop()
        try:
            if not self.session.stop.repeated:
                self.checkpoints.close()
            self._opened.close()
        finally:
            self.session.close()

    def _is_evaluated(self, step: int) -> bool:
        return not self.session.eval_prompts or self.reporter.has_evaluation(step)


class RngState:
    """The states of torch's and Python's random number generators, as part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        version, numbers, gauss = random.getstate()
        return {"torch": platform().rng_state(), "python": [version, list(numbers), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        platform().set_rng_state(state["torch"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))


def sampling_params(config: RunConfig, stop_ids: tuple[int, ...], spec: ModelSpec) -> SamplingParams:
    """How training samples its rollouts; the collector sets step and window."""
    rollout, experts = config.rollout, spec.experts
    replayed = config.model.replay_routing and experts is not None
    return SamplingParams(
        samples=rollout.samples_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k or (TOP_P_CANDIDATES if rollout.top_p < 1 else 0),
        stop_ids=stop_ids,
        seed=config.train.seed,
        routing=Routing(spec.num_layers, experts.per_token, experts.count) if replayed else None,
    )


def policy_updates(config: RunConfig, algorithm: Algorithm) -> int:
    """The number of policy updates in the whole run, over which the learning rate decays; at most so many are made.

    The policy is not updated in the first steps if it waits for the contrastive head or the critic, and a step may
    leave a replay out.
    """
    clipo = config.clipo
    waits = clipo.warmup_steps if clipo.enabled and not clipo.warmup_policy else 0
    if Signal.values in algorithm.needs:
        waits = max(waits, config.critic.warmup_steps)
    steps = max(config.train.steps - waits, 1)
    return steps * config.algorithm.epochs * config.algorithm.mini_batches * (1 + algorithm.replays)


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps happens after step number `step`."""
    return every > 0 and step % every == 0
