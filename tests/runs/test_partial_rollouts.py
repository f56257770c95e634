"""Rollouts that grow in windows: every token trains once, in the step that drew it, and the next step goes on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collector_steps import NEW_TOKENS, SAMPLES, Bench, prompts
from ranks import RankPool
from safetensors.torch import load_file
from small_runs import (
    EVERY,
    STEPS,
    SmallRun,
    assert_nearly_same_metrics,
    assert_same_run,
    halfway,
    metrics,
    write_model,
)

from clipo_megatron.config.schema import RolloutConfig
from clipo_megatron.flow import Rollout, RolloutGroup
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.rollout.servers.response_checks import Continuation, joined, settled
from clipo_megatron.training.prompt_assignment import deal_by_load
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine
from clipo_megatron.training.partial_rollouts import going_on, open_rollouts

pytestmark = pytest.mark.timeout(300)
WINDOW = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


def test_where_a_window_ends() -> None:
    params = SamplingParams(max_new_tokens=10, window_tokens=4)
    assert [params.limit(trained) for trained in (0, 4, 8)] == [4, 8, 10]
    assert [params.cut(tokens) for tokens in (4, 8, 10)] == ["window", "window", "length"]
    assert replace(params, window_tokens=None).limit() == 10
    tokens = torch.arange(6)
    begun = Rollout(tokens, torch.zeros(6), "", "abort", torch.zeros(6).long(), 1, trained=4)
    assert settled(begun, params) is None, "it was interrupted within its second window"
    piece = Continuation(torch.arange(2).numpy(), torch.zeros(2).numpy(), torch.ones(2).long().numpy(), "length", "")
    whole = joined(begun, piece, 1, params, None)
    assert (whole.finish, whole.trained, whole.tokens.numel()) == ("window", 4, 8)
    assert settled(replace(whole, finish="abort"), params) == whole


def test_rollouts_still_open_are_counted() -> None:
    def group(*open_: bool) -> RolloutGroup:
        one = torch.ones(1).long()
        return RolloutGroup(
            0,
            prompts(1)[0],
            [Rollout(one, one.float(), "", "window" if each else "stop", one, i) for i, each in enumerate(open_)],
        )

    three, two, none = group(True, False, True, True), group(True, True, False, False), group(False, False)
    assert len(going_on([three, two, none])) == 2
    assert [open_rollouts(going_on(each), 4) for each in ([three], [three, two], [none])] == [3, 5, 0]
    assert open_rollouts([Request(0, prompts(1)[0])], 4) == 4
    assert deal_by_load([5, 0, 2], 4, 4) == [1, 2, 1, 0] and deal_by_load([3], 0, 4) == deal_by_load([3], -1, 4) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_in_windows_is_the_response(model: Path, temperature: float) -> None:
    """Greedy: token by token that of one call. Sampled: each window's log-probs are those of a plain forward."""
    engine = LocalEngine(model, dtype=torch.float32, device="cpu", batch_size=7)
    engine.load_weights(load_file(model / "model.safetensors").items(), version=0)
    params = SamplingParams(samples=3, max_new_tokens=7, temperature=temperature, seed=1)
    requests = [Request(place, prompt) for place, prompt in enumerate(prompts(4))]
    whole = {group.position: group for group in engine.generate(requests, params, deadline_s=60)}
    grown: dict[int, RolloutGroup] = {}
    for step in range(3):
        cut = replace(params, window_tokens=3, step=step)
        for group in engine.generate(requests, cut, deadline_s=60):
            assert [each.sample for each in group.rollouts] == [0, 1, 2]
            grown[group.position] = group
        requests = going_on(grown[each.position] for each in requests)
        assert {rollout.trained for each in requests for rollout in each.begun} == (
            {3 * (step + 1)} if step < 2 else set()
        )
    for position, group in grown.items():
        for mine, theirs in zip(group.rollouts, whole[position].rollouts, strict=True):
            assert (mine.tokens.numel(), mine.finish) == (7, "length")
            if not temperature:
                assert mine.tokens.tolist() == theirs.tokens.tolist()
                torch.testing.assert_close(mine.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)
            sequence = torch.cat([group.prompt.tokens, mine.tokens])[None]
            with torch.inference_mode():
                logits = engine._model(sequence).logits[0, group.prompt.tokens.numel() - 1 : -1].float()
            plain = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, mine.tokens[:, None])[:, 0]
            torch.testing.assert_close(mine.logprobs, plain, rtol=1e-4, atol=1e-4)


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


T_PPO = (
    "algorithm.name=t_ppo",
    f"rollout.window_tokens={WINDOW}",
    "critic.learning_rate=1e-3",
    "eval.every=0",
    "eval.at_start=false",
)


def test_a_run_in_windows_on_any_layout_and_resumed(small_config, tmp_path) -> None:
    """Undisturbed on one rank, on TP2 x PP2, and resumed halfway: to the bit, and on the other layout nearly so."""
    undisturbed = tmp_path / "undisturbed"
    SmallRun(small_config, undisturbed, *T_PPO).wait()
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(0 < line["rollout/windows"] < 1 for line in lines) and all(
        line["reward/ungraded"] == 0 for line in lines
    )
    assert any(line.get("clipo/bonus_mean", 0.0) != 0 for line in lines), lines
    for name, layout in (("same", ()), ("other", ("layout.tp=2", "layout.pp=2"))):
        run = SmallRun(small_config, halfway(undisturbed, tmp_path / name), *layout, *T_PPO).wait()
        assert f"{EVERY} steps done" in run.said
    assert_same_run(tmp_path / "same", undisturbed)
    names = ("critic/loss", "critic/explained_variance", "policy/loss", "reward/mean", "rollout/windows")
    assert_nearly_same_metrics(tmp_path / "other", undisturbed, names)
