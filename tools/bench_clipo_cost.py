"""What CLIPO costs: its share of the learning half of a GRPO step, on the same rollouts.

    python tools/bench_clipo_cost.py MODEL_DIR [--prompts 16 --samples 8 --dim 512]

Two figures, from one process and one actor:
    direct      the parts that only CLIPO needs, timed where they run: pooling the states in the scoring forward; head,
                loss and head step with their communication; the reward; its metrics
    difference  the median step with CLIPO minus the median step without, the two alternating; it also sees what the
                direct figure cannot, and all the noise of the machine

The step that they are shares of is scoring and update. Rollouts and weight sync, which CLIPO leaves alone, are left
out: with them the share is smaller still. The old log-probs are needed without CLIPO too, so scoring counts as GRPO's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.clipo.statistics import statistics as contrastive_statistics
from clipo_megatron.algorithms.hook import Signal
from clipo_megatron.config.schema import DType, HeadKind, RunConfig
from clipo_megatron.flow import Experience, RolloutTable, Sample
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.random_rollouts import random_rollouts
from clipo_megatron.runtime.platform import platform


def now() -> float:
    """Seconds; CPU time where one thread of a CPU computes, since that does not tell of other processes."""
    on_one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if on_one_thread else time.perf_counter()


class Clock:
    """Adds up the seconds of the functions it wraps, with the device's queue empty at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that its time is counted under `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            platform().synchronize()
            start = now()
            result = function(*args, **kwargs)
            platform().synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - start
            return result

        return call


def learn(
    actor: PolicyActor,
    algorithm: Algorithm,
    table: RolloutTable,
    samples: list[Sample],
    report: Callable[[PolicyActor, Experience], None],
) -> None:
    """Exchange, score and update, as the trainer does."""
    table = dataclasses.replace(table, signals={})
    actor.needs = algorithm.needs
    mini_batches = actor.batcher.mini_batches_of(samples, table)
    actor.score([micro for batch in mini_batches for micro in batch.micro_batches], table, algorithm)
    experience = algorithm.assign_advantages(table, mini_batches)
    for batch in mini_batches:
        actor.update(actor.batcher.with_advantages(batch, experience, algorithm), experience, algorithm)
    algorithm.after_update(experience, learned=True)
    if Signal.contrastive in algorithm.needs:
        report(actor, experience)


def contrastive_metrics(actor: PolicyActor, experience: Experience) -> None:
    """Compute the metrics that a run reports of the contrastive head."""
    table = experience.table
    contrastive_statistics(
        table.correct,
        table.group,
        table.signals["contrastive_loss"],
        table.signals["contrastive_valid"],
        experience.bonus,
        floor=actor.config.clipo.floor,
        embeddings=actor.contrastive.embeddings.cpu(),
    )


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
    """The seconds of each step, of "grpo" and of "clipo", and those of CLIPO's parts in each of its steps."""
    config = RunConfig()
    config.model.path, config.model.dtype = str(options.model), DType(options.dtype)
    config.layout.max_tokens_per_microbatch = options.max_tokens
    config.clipo.dim, config.clipo.head = options.dim, HeadKind(options.head)
    with_clipo = build_algorithm(config)
    config.clipo.enabled = False
    without = build_algorithm(config)

    layout = parallel.initialize(config.layout, seed=0)
    actor = PolicyActor(config, layout, needs=with_clipo.needs, total_steps=1000)
    table, samples = random_rollouts(  # every other one is correct, so that every group has a bonus
        actor.spec.vocab_size,
        groups=options.prompts,
        samples=options.samples,
        prompt=options.prompt_tokens,
        response=options.response_tokens,
    )

    clock = Clock()
    actor.stage.pooled_states = clock.timed("pooling", actor.stage.pooled_states)
    actor.contrastive.step = clock.timed("head, loss, head step", actor.contrastive.step)
    with_clipo.bonus = clock.timed("reward", with_clipo.bonus)
    report = clock.timed("metrics", contrastive_metrics)

    seconds: dict[str, list[float]] = {"grpo": [], "clipo": []}
    parts = []
    for number in range(options.rounds + 1):
        for name, algorithm in (("grpo", without), ("clipo", with_clipo)):
            clock.seconds.clear()
            platform().synchronize()
            start = now()
            learn(actor, algorithm, table, samples, report)
            platform().synchronize()
            if number:  # the first round warms up
                seconds[name].append(now() - start)
                if name == "clipo":
                    parts.append(dict(clock.seconds))
    parallel.shutdown()
    return seconds, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=26, help="on average")
    parser.add_argument("--response-tokens", type=int, default=10, help="on average")
    parser.add_argument("--max-tokens", type=int, default=1024, help="packed tokens of a micro-batch")
    parser.add_argument("--dim", type=int, default=512, help="d, of the contrastive embedding")
    parser.add_argument("--head", choices=[kind.value for kind in HeadKind], default="linear")
    parser.add_argument("--dtype", choices=[kind.value for kind in DType], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    platform().init_process_group(0, 1, timeout_s=600, store=dist.HashStore())
    seconds, parts = measure(options)

    grpo, clipo = statistics.median(seconds["grpo"]), statistics.median(seconds["clipo"])
    direct = {name: statistics.median(each[name] for each in parts) for name in parts[0]}
    total = sum(direct.values())
    print(
        f"{options.prompts} prompts x {options.samples} samples, d = {options.dim}, {options.head} head, "
        f"{options.dtype}, {options.threads} threads, median of {options.rounds} rounds"
    )
    print(f"GRPO step without rollouts and sync {grpo:9.3f} s")
    for name, value in direct.items():
        print(f"    {name:31} {value * 1e3:9.2f} ms {value / grpo:8.3%}")
    print(f"CLIPO, direct                       {total * 1e3:9.2f} ms {total / grpo:8.3%}")
    print(f"CLIPO, difference of medians        {(clipo - grpo) * 1e3:9.2f} ms {(clipo - grpo) / grpo:8.3%}")


if __name__ == "__main__":
    main()
