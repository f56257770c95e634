"""The loop: prompts -> rollouts -> verdicts -> scores -> rewards -> advantages -> update -> new weights.

`Trainer.train_step` is the algorithm; everything it calls is a room of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import MicroBatch, Prompt, RolloutTable, Sample, ScoredGroup, StepReport
from clipo_megatron.policy.exchange import build_table, deliver
from clipo_megatron.policy.packing import pack, plan_micro_batches
from clipo_megatron.report.console import Stopwatch
from clipo_megatron.report.metrics import speed_metrics, table_metrics
from clipo_megatron.run import Run

MiniBatch = tuple[torch.Tensor, list[MicroBatch]]  # rows [M] of the table, and this rank's packed share of them


class Trainer:
    """Trains one policy. `run` holds the parts; the trainer holds nothing but the step."""

    def __init__(self, run: Run):
        self.run = run
        self.step = run.restore()

    def train(self) -> None:
        """Steps until the last one, or until somebody asks to stop; either way the state is saved."""
        run = self.run
        run.before_training(self.step)
        while self.step < run.config.train.steps and not run.stop_requested():
            report = self.train_step()
            run.report(report)
            self.step += 1
            if run.is_due(run.config.checkpoint.every, self.step):
                run.checkpoints.save(self.step)
            if run.is_due(run.config.eval.every, self.step):
                run.evaluate(self.step)
        run.after_training(self.step)

    def train_step(self) -> StepReport:
        """One step of the algorithm; collective."""
        run, watch = self.run, Stopwatch()
        actor, algorithm = run.actor, run.algorithm

        with watch("generate"):
            prompts = [run.train_prompts[index] for index in run.sampler.next()]
            scored = self.rollouts(prompts)
        with watch("exchange"):
            table, samples = build_table(scored, step=self.step)
            mini_batches = self.deliver(samples, table)
        with watch("score"):
            metrics = actor.score(micros_of(mini_batches), table)

        keep = algorithm.select(table)
        reward = algorithm.shape_reward(table)
        advantage = algorithm.advantage(table, reward)
        with watch("update"):
            if run.policy_learns():
                for epoch in range(run.config.algorithm.epochs):
                    for index, (rows, micros) in enumerate(mini_batches):
                        self.credit(micros, advantage, algorithm.token_weight(table, rows[keep[rows]]))
                        update = actor.update(micros, algorithm.loss)
                        if epoch == index == 0:
                            metrics["policy/first_update_kl"] = update["policy/update_kl"]
                        metrics |= update
            algorithm.after_update(table)
        with watch("sync"):
            run.sync.push(self.step + 1)

        run.samples.write(scored, table, reward, advantage)
        metrics |= table_metrics(table, reward, advantage)
        metrics |= run.contrastive_metrics(table)
        metrics |= speed_metrics(watch, table, micros_of(mini_batches), world=run.layout.world)
        return StepReport(self.step, metrics)

    def rollouts(self, prompts: list[Prompt]) -> list[ScoredGroup]:
        """This rank's share of the step's rollouts, graded while others still generate."""
        run = self.run
        params = replace(run.sampling, step=self.step)
        mine = [(position, prompts[position]) for position in run.share(len(prompts))]
        for group in run.engine.generate(mine, params, deadline_s=run.config.rollout.deadline_s):
            run.graders.submit(group)
        return run.graders.collect()

    def deliver(self, samples: list[Sample], table: RolloutTable) -> list[MiniBatch]:
        """Plan who trains what, move the rollouts there, and pack them."""
        layout, config = self.run.layout, self.run.config
        groups = len(table.prompt_ids)
        lengths = (table.prompt_length + table.response_length).tolist()
        owner = torch.full((table.size,), -1)
        plans: list[tuple[torch.Tensor, list[list[int]]]] = []
        for part in torch.arange(groups).tensor_split(config.algorithm.mini_batches):
            rows = torch.isin(table.group, part).nonzero().squeeze(1)
            plan = plan_micro_batches(
                [lengths[row] for row in rows.tolist()], layout.dp, config.layout.max_tokens_per_microbatch
            )
            for dp_rank, micro_batches in enumerate(plan):
                for members in micro_batches:
                    owner[rows[members]] = dp_rank
            plans.append((rows, [rows[members].tolist() for members in plan[layout.dp_rank]]))
        held = deliver(samples, table, owner, layout)
        multiple = layout.tp if layout.sequence_parallel else 1
        return [
            (
                rows,
                [pack([held[row] for row in members], multiple=multiple, device=self.run.device) for members in mine],
            )
            for rows, mine in plans
        ]

    @staticmethod
    def credit(micros: list[MicroBatch], advantage: torch.Tensor, weight: torch.Tensor) -> None:
        """Give every target its rollout's advantage and its weight in the loss."""
        for micro in micros:
            rows = micro.rows[micro.segment].cpu()
            micro.advantages = advantage[rows].to(micro.tokens.device)
            micro.weights = weight[rows].to(micro.tokens.device)


def micros_of(mini_batches: list[MiniBatch]) -> list[MicroBatch]:
    """All micro-batches of a step, in order."""
    return [micro for _, micros in mini_batches for micro in micros]


def run(config: RunConfig) -> None:
    """Train as a configuration says; every rank calls it."""
    parts = Run(config)
    try:
        Trainer(parts).train()
    finally:
        parts.close()
