"""A collector on a rank with everything around it, for tests of a step's groups."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interrupted_engine import InterruptedEngine
from safetensors.torch import load_file
from small_runs import FAVOURITE

from clipo_megatron.config.schema import RewardConfig, RolloutConfig
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import Prompt, ScoredGroup
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine
from clipo_megatron.rollout.source import RolloutSource
from clipo_megatron.training.collector import Collector

SAMPLES, NEW_TOKENS = 4, 5
COUNTS = ("refilled_groups", "discarded_groups", "dropped_prompts", "carried_prompts", "rounds", "recoveries")


def prompts(count: int) -> list[Prompt]:
    """Problems of different lengths; the model of `small_runs` solves each now and then."""
    generator = torch.Generator().manual_seed(5)
    return [
        Prompt(
            f"p/{row}",
            ({"role": "user", "content": "?"},),
            torch.randint(3, 250, (3 + row % 9,), generator=generator),
            "reasoning_gym/chain_sum",
            FAVOURITE,
        )
        for row in range(count)
    ]


@cache
def graders() -> GraderPool:
    """The grader pool of this process, started once because that takes longer than most cases."""
    return GraderPool(RewardConfig(deadline_s=60.0))


class Bench:
    """A collector on this rank with everything around it; runs within `ranks.run`."""

    def __init__(
        self,
        folder: Path,
        config: RolloutConfig,
        *,
        size: int = 6,
        problems: int = 400,
        rollout_ranks: list[int] | None = None,
        interrupted: dict[str, Any] | None = None,
    ):
        self.weights = load_file(folder / "model.safetensors")
        local = LocalEngine(folder, dtype=torch.float32, device="cpu", batch_size=32)
        self.engine: Any = InterruptedEngine(local, **interrupted) if interrupted is not None else local
        self.update_weights(0)
        self.graders = graders()
        self.sampler = PromptSampler(problems, size, seed=3)
        self.recoveries = 0
        asking = list(range(dist.get_world_size())) if rollout_ranks is None else rollout_ranks
        self.collector = Collector(
            config,
            RolloutSource(self.engine, asking, self.resync),
            self.graders,
            prompts=prompts(problems),
            sampler=self.sampler,
            sampling=SamplingParams(samples=SAMPLES, max_new_tokens=NEW_TOKENS, stop_ids=(1,), seed=7),
            max_refill_rounds=config.max_refill_rounds or 0,
        )

    def update_weights(self, version: int) -> None:
        self.engine.load_weights(self.weights.items(), version=version)

    def resync(self) -> None:
        self.recoveries += 1
        dist.all_reduce(torch.zeros(1))  # collective, as a weight sync is: the case times out unless all ranks come
        self.update_weights(self.engine.version)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def facts(scored: list[ScoredGroup]) -> list[tuple[int, str, list[list[int]], list[bool | None]]]:
    """Position, prompt, tokens and verdicts of each group."""
    return [
        (
            each.group.position,
            each.group.prompt.id,
            [rollout.tokens.tolist() for rollout in each.group.rollouts],
            [verdict.correct for verdict in each.verdicts],
        )
        for each in scored
    ]


def run_steps(folder: Path, config: RolloutConfig, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Collect `steps` steps on this rank, with an update of the weights after each."""
    with Bench(folder, config, **options) as bench:
        batches, metrics = [], []
        for step in range(steps):
            scored, counts = bench.collector.collect(step)
            batches.append(facts(scored))
            metrics.append({name: counts[f"rollout/{name}"] for name in COUNTS})
            bench.update_weights(step + 1)
        state = bench.sampler.state_dict()
        return {"batches": batches, "metrics": metrics, "drawn": state["epoch"] * 400 + state["offset"]}


def merged(results: list[dict[str, Any]]) -> list[list[Any]]:
    """The steps' groups of all ranks, by position; every rank must have counted the same."""
    for name in ("metrics", "drawn"):
        assert all(each[name] == results[0][name] for each in results)
    steps = zip(*(each["batches"] for each in results), strict=True)
    return [sorted(group for part in step for group in part) for step in steps]
