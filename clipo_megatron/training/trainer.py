"""The training loop: prompts -> rollouts -> verdicts -> scores -> rewards -> advantages -> update -> new weights.

`Trainer.train_step` is the algorithm on one page.
"""

from __future__ import annotations

from contextlib import closing, suppress

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import StepReport
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.rollout.engine import Cancelled
from clipo_megatron.telemetry.console import Stopwatch
from clipo_megatron.telemetry.metrics import speed_metrics, table_metrics
from clipo_megatron.training.ages import age_metrics
from clipo_megatron.training.run import Run


class Trainer:
    """Trains one policy, from the step that `run` resumes at. The run holds the parts, the trainer only the step."""

    def __init__(self, run: Run):
        self.run = run
        self.step = run.restore()

    def train(self) -> None:
        """Train until the last step or a stop signal; either way the state is saved."""
        run = self.run
        with suppress(Cancelled):  # rollouts outlasted the grace period: the run that resumes repeats the step
            run.before_training(self.step)
            while self.step < run.config.train.steps and not run.session.stop.on_any_rank():
                report = self.train_step()
                run.reporter.step(report)
                self.step += 1
                run.after_step(self.step)
        run.after_training(self.step)

    def train_step(self) -> StepReport:
        """One step of the algorithm; collective."""
        run, session = self.run, self.run.session
        watch = Stopwatch(session.heartbeat.phase)
        actor, algorithm = run.actor, run.algorithm

        with watch("generate"):
            scored, metrics = run.collector.collect(self.step, last=run.config.train.steps - 1)
            run.engine.offload()  # colocated servers give their GPU memory to training
        with watch("exchange"):
            table, samples = build_table(scored, step=self.step, observe=algorithm.observe)
            if ahead := run.config.rollout.ahead:
                metrics |= age_metrics(scored, step=self.step, bound=ahead)
            mini_batches = actor.batcher.mini_batches_of(samples, table)
            micro_batches = [micro for batch in mini_batches for micro in batch.micro_batches]
        with watch("score"):
            metrics |= actor.score(micro_batches, table, algorithm)
            experience = algorithm.assign_advantages(table, mini_batches)  # rewards, advantages, which rollouts train
            actor.batcher.assign_token_advantages(experience, algorithm)
        with watch("update"):
            metrics |= actor.update_critic(experience, algorithm)  # if there is a critic
            plan = algorithm.replay(experience)  # empty while a hook freezes the policy
            updates = [(each, batch) for each in plan for batch in each.mini_batches * run.config.algorithm.epochs]
            for place, (each, batch) in enumerate(updates):
                weighed = actor.batcher.with_advantages(batch, each, algorithm)
                # Before the first, the weights are those that scored.
                metrics |= actor.update(weighed, each, algorithm, first=not place, last=place == len(updates) - 1)
            if plan and run.config.report.measure_update_kl:
                metrics |= actor.measure_update(micro_batches)
            algorithm.after_update(experience, learned=bool(plan))
        with watch("sync"):
            metrics |= run.engine.update_weights(self.step + 1)

        run.recorder.ledger.write(run.collector.accounts)
        run.recorder.step(scored, table, experience.reward, experience.advantage, experience.bonus, watch)
        metrics |= table_metrics(table, experience.reward, experience.advantage)
        metrics |= actor.contrastive_metrics(table, experience.bonus)
        metrics |= speed_metrics(watch, table, micro_batches, world=session.layout.world)
        return StepReport(self.step, metrics)


def run(config: RunConfig) -> None:
    """Train as the configuration says; every rank calls it."""
    with closing(Run(config)) as parts:
        Trainer(parts).train()
