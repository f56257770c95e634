"""Rollouts that grow in windows: every token trains once, in the step that generated it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from collector_steps import NEW_TOKENS, SAMPLES, Bench
from ranks import RankPool
from small_runs import (
    write_model,
)

from clipo_megatron.config.schema import RolloutConfig
from clipo_megatron.flow import Rollout
from clipo_megatron.policy.batch.exchange import build_table

WINDOW = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


def account(folder: Path, seed: int, rollout_ranks: list[int] | None, saved_at: int) -> dict[str, Any]:
    """On a rank: some steps with an engine that is lost at random, saved and loaded once; what trained in each."""
    faults = {"seed": seed * 100 + dist.get_rank(), "loss": 0.1, "limit": 3}
    config = RolloutConfig(window_tokens=WINDOW)
    with Bench(folder, config, rollout_ranks=rollout_ranks, interrupted=faults) as bench:
        steps: list[list[tuple[str, Rollout, bool | None]]] = []
        sizes, offsets, took = [], [], []
        for step in range(6):
            bench.engine.losses = 0
            scored, counts = bench.collector.collect(step)
            table, samples = build_table(scored, step=step)
            took.append(counts["rollout/carried_prompts"])
            assert table.response_length.max() <= WINDOW and table.fresh.all()
            assert not (table.unfinished & table.graded).any() and not (table.unfinished & table.truncated).any()
            for sample in samples:
                assert sample.prompt.numel() == table.prompt_length[sample.row]
                assert sample.response.numel() == sample.logprobs.numel() == table.response_length[sample.row]
            steps.append(
                [
                    (each.group.prompt.id, rollout, verdict.correct)
                    for each in scored
                    for rollout, verdict in zip(each.group.rollouts, each.verdicts, strict=True)
                ]
            )
            sizes.append(table.size)
            offsets.append(bench.sampler.offset)
            bench.update_weights(step + 1)
            if step == saved_at:
                states = [bench.collector.state_dict()]
                dist.broadcast_object_list(states, src=0)
                bench.collector.load_state_dict(states[0])
        return {"steps": steps, "sizes": sizes, "offsets": offsets, "took": took, "recoveries": bench.recoveries}


@pytest.mark.parametrize(("world", "rollout_ranks"), [(1, None), (3, [0, 2])], ids=["one rank", "two of three ask"])
@pytest.mark.parametrize("saved_at", [-1, 2], ids=["", "resumed"])
def test_every_token_trains_once(ranks: RankPool, model: Path, world: int, rollout_ranks: Any, saved_at: int) -> None:
    results = ranks.run(account, world, model, 11, rollout_ranks, saved_at)
    assert sum(each["recoveries"] for each in results) > 0, "the engine was never lost"
    trained: dict[tuple[str, int], list[int]] = defaultdict(list)
    ended: dict[tuple[str, int], Rollout] = {}
    for step in range(6):
        before = {key: list(tokens) for key, tokens in trained.items()}
        for name, rollout, correct in [each for result in results for each in result["steps"][step]]:
            key = (name, rollout.sample)
            assert key not in ended, "a rollout that had ended trained again"
            assert rollout.trained == len(before.get(key, []))
            assert rollout.tokens.tolist()[: rollout.trained] == before.get(key, [])
            trained[key] = rollout.tokens.tolist()
            assert (correct is None) == (rollout.finish == "window")
            if rollout.finish != "window":
                ended[key] = rollout
        sizes = results[0]["sizes"]
        assert 6 * SAMPLES - (SAMPLES - 1) <= sizes[step] <= 6 * SAMPLES, "a batch is full of rollouts"
    open_ = set(trained) - set(ended)
    last = {(name, rollout.sample) for result in results for name, rollout, _ in result["steps"][5]}
    assert open_ <= last, "a rollout was forgotten"
    longest = max(len(rollout.tokens) for rollout in ended.values())
    assert longest == NEW_TOKENS and any(len(rollout.tokens) > WINDOW for rollout in ended.values())
    assert all(
        each.finish == "length" for each in ended.values() if len(each.tokens) == NEW_TOKENS and each.tokens[-1] != 1
    )
    assert sum(results[0]["took"]) > 0 and results[0]["offsets"][0] == 6
