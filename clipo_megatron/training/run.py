"""A run and its parts, put together from a configuration: what the trainer's page takes for granted."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import Signal
from clipo_megatron.algorithms.methods.registry import max_refill_rounds
from clipo_megatron.checkpoint import Checkpoints, Owner
from clipo_megatron.checkpoint.retention import Retention
from clipo_megatron.config.model_folder import CRITIC
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.data.splits import training_problems
from clipo_megatron.evaluation.results import Evaluation
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.replay import ReplayCheckpointer
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.rollout.engine import Cancelled, SamplingParams
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.run_dir import CHECKPOINTS, set_aside
from clipo_megatron.telemetry.recorder import Recorder
from clipo_megatron.training.collector import Collector
from clipo_megatron.training.session import Session
from clipo_megatron.training.stage_context import context_of
from clipo_megatron.training.stop_signal import Stopped
from clipo_megatron.weights.formats.source import sidecar_files


class Run(Session):
    """One rank's view of a run. Constructing it is collective: ranks meet, the policy is built and loaded."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.train_prompts = training_problems(config, self.tokenizer, self.eval_prompts, self.reporter.say)
        self.sampler = PromptSampler(
            len(self.train_prompts), config.data.prompts_per_step, seed=config.train.seed, shuffle=config.data.shuffle
        )
        self.sampling = SamplingParams(
            samples=config.rollout.samples_per_prompt,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop_ids=self.stop_ids,
            seed=config.train.seed,
        )
        self.algorithm: Algorithm = build_algorithm(config, context_of(config, self.tokenizer, self.train_prompts))
        needs, updates = self.algorithm.needs, policy_updates(config, self.algorithm)
        self.actor = self.equip(lambda: PolicyActor(config, self.layout, needs=needs, total_steps=updates))
        self.recorder = Recorder(config, self.layout, self.actor)
        self.collector = Collector(
            config.rollout,
            max_refill_rounds=max_refill_rounds(config),
            prompts=self.train_prompts,
            sampler=self.sampler,
            engine=self.engine,
            graders=self.graders,
            sampling=self.sampling,
            rollout_ranks=self.rollout_ranks,
            resync=self.resync,
            progress=self.reporter.progress.rollouts,
            should_cancel=self.stop.should_cancel,
        )
        self.checkpoints = self._checkpoints()
        self.stop.watch()

    # --- life ----------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Load the newest checkpoint if there is one, and give the engine the policy's weights.

        With checkpoint.resume = false, what earlier runs left in the output folder is moved aside instead.

        Returns:
            How many steps are done.
        """
        step = 0
        if not self.config.checkpoint.resume:
            if self.is_main and (shelf := set_aside(self.output)):
                self.reporter.say(f"starting over: the results of the run before are in {shelf}")
        elif newest := self.checkpoints.latest():
            step = self.checkpoints.load(newest)
            self.reporter.say(f"resumed from {newest}, {step} steps done")
        elif self.is_main and self.reporter.has_metrics:
            self.reporter.say(f"{self.output} has metrics but no checkpoint: starting from the beginning")
        self.reporter.restore(step)
        self.update_weights(step)
        return step

    def before_training(self, step: int) -> None:
        """Open the logs; evaluate the policy if that is due and was not done."""
        config = self.config
        self.reporter.open(step)
        self.recorder.open(step)
        self.reporter.say(
            f"{config.name}: {Path(config.model.path).name}, {len(self.train_prompts)} problems, "
            f"{config.data.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples a step, "
            f"{self.layout.world} ranks ({self.layout})"
        )
        due = config.eval.at_start if step == 0 else is_due(config.eval.every, step)
        if step >= config.train.steps:
            self.reporter.say(f"nothing to train: {step} steps are done; to go on, set train.steps higher than that")
        elif due and not self._evaluated(step):
            self.evaluate(step)

    def after_training(self, step: int) -> None:
        """Save, evaluate, and say where everything is.

        Raises:
            Stopped: there are steps left, or an evaluation.
        """
        finished = step >= self.config.train.steps
        if not self.checkpoints.has(step) and (self.config.checkpoint.at_end or not finished):
            self.save(step, goes_on=finished)
        if finished and not self._evaluated(step):
            with suppress(Cancelled):
                self.evaluate(step)
            finished = self._evaluated(step)
        self.heartbeat.phase("checkpoint")
        self.checkpoints.wait(last=True)
        self.heartbeat.leave()
        self.recorder.close()
        dist.barrier()  # the first to go takes the others' store along
        self.reporter.close(step)
        if not finished:
            raise Stopped(step, self.config.train.steps, self.stop.signum)

    def close(self) -> None:
        """Free all that it holds, when what is being written has been. Idempotent."""
        self.heartbeat.leave()
        if not self.stop.insisted:
            self.checkpoints.close()
        self.recorder.close()
        super().close()

    def evaluate(self, step: int) -> None:
        """Keep and tell how the policy does on the held-out problems, if there are any; collective.

        Raises:
            Abandoned: on every rank: it was asked to end, and answers took too long.
        """
        if self.eval_prompts:
            self.reporter.evaluated(self.measure(step))

    def measure(self, step: int) -> Evaluation:
        """As the session's, without the step's own requests, which the engine would answer too."""
        self.collector.withdraw()
        return super().measure(step)

    def keep(self, step: int) -> None:
        """After a step: hear of the checkpoint that is being written, and save if that is due; collective."""
        self.checkpoints.news()
        if is_due(self.config.checkpoint.every, step):
            self.save(step)

    def save(self, step: int, *, goes_on: bool = True) -> None:
        """Take a checkpoint; collective. Colocated servers step aside, and get their weights again if it goes on."""
        self.heartbeat.phase("checkpoint")
        self.sync.offload()
        self.checkpoints.save(step)
        if self.config.rollout.colocated and goes_on:
            self.update_weights(self.version)

    def _evaluated(self, step: int) -> bool:
        return not self.eval_prompts or self.reporter.knows_evaluation(step)

    # --- construction --------------------------------------------------------------------------------------------

    def _checkpoints(self) -> Checkpoints:
        actor, layout = self.actor, self.layout
        owners = [
            Owner("sampler", self.sampler.state_dict, self.sampler.load_state_dict, writes=self.is_main),
            Owner("algorithm", self.algorithm.state_dict, self.algorithm.load_state_dict, writes=self.is_main),
            Owner(
                "rollouts",
                self.collector.state_dict,
                self.collector.load_state_dict,
                writes=self.is_main,
                gathers=True,
                optional=True,
            ),
            Owner("rng", self._rng_state, self._load_rng, per_rank=True),
        ]
        if actor.contrastive is not None:
            leads = layout.tp_rank == 0 and layout.dp_rank == 0
            owners.append(
                Owner("contrastive", actor.contrastive.state_dict, actor.contrastive.load_state_dict, writes=leads)
            )
        if self.algorithm.replays:
            replays = ReplayCheckpointer(self.algorithm, actor.batcher)
            owners.append(
                Owner("replay", replays.state_dict, replays.load_state_dict, writes=self.is_main, gathers=True)
            )
        clipo, settings = self.config.clipo, self.config.checkpoint
        keeper, critic = TrainableCheckpointer(actor.trainable), actor.critic
        values = TrainableCheckpointer(critic.trainable) if critic else None
        checkpoints = Checkpoints(
            self.output / CHECKPOINTS,
            owners,
            take_policy=keeper.take,
            load_policy=keeper.load,
            more={CRITIC: (values.take, values.load)} if values else None,
            retention=Retention(settings.keep, settings.keep_every, settings.keep_best),
            facts={
                "model": actor.spec.architecture(),
                "algorithm": list(self.algorithm.state_dict()),
                "contrastive head": {"kind": clipo.head.value, "dim": clipo.dim} if clipo.enabled else None,
                "critic": critic.spec.architecture() if critic else None,
                "layout": {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "ep": layout.division.ep},
            },
            say=self.reporter.say,
            beside=sidecar_files(self.config.model.path) if self.is_main else None,
            accuracy=self.reporter.accuracies,
            asynchronous=settings.asynchronous,
            deadline_s=settings.deadline_s,
            failures=settings.max_failed_saves,
        )
        for each in (actor, *([critic] if critic else [])):
            each.trainable.pre_mutation_hook = checkpoints.settle
        return checkpoints

    def _rng_state(self) -> dict[str, Any]:
        version, numbers, gauss = random.getstate()
        return {"torch": platform().rng_state(), "python": [version, list(numbers), gauss]}

    def _load_rng(self, state: dict[str, Any]) -> None:
        platform().set_rng_state(state["torch"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))


def policy_updates(config: RunConfig, algorithm: Algorithm) -> int:
    """Updates of the policy in the whole run, by which its learning rate falls: at most, for replays may be left out.

    Steps at the beginning in which the policy waits, for the contrastive head or for the critic, make none.
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
