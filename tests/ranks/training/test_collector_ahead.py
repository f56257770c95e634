"""Rollouts of later steps, begun while earlier ones train: each prompt trains once, in time, in order, and survives."""

from __future__ import annotations

import json
import math
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collector_steps import SAMPLES, Bench, graders, prompts
from ranks import RankPool
from small_runs import write_model

from clipo_megatron.config.schema import RolloutConfig, Unfinished
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import Rollout, RolloutGroup
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.source import RolloutSource
from clipo_megatron.training.collector import Collector
from clipo_megatron.training.ledger import Accounts, Balance, Ledger, balance

SIZE, STEPS = 6, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


def account(
    folder: Path, config: RolloutConfig, seed: int, rollout_ranks: list[int] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """On a rank: some steps with an engine that is lost at random, saved and loaded after some; what trained when."""
    faults = {"seed": seed * 100 + dist.get_rank(), **options.get("faults", {"loss": 0.05, "limit": 3})}
    saved_at, config_after = options.get("saved_at"), options.get("after", config)
    with Bench(folder, config, rollout_ranks=rollout_ranks, interrupted=faults) as bench:
        trained, windows, accounts, answered, restarted, kept = [], [], [], [], 0.0, 0
        for step in range(STEPS):
            bench.engine.losses = 0
            scored, counts = bench.collector.collect(step, last=STEPS - 1)
            accounts.append(bench.collector.accounts)
            answered.append(len(bench.engine.answered))
            restarted += counts.get("rollout/restarted_prompts", 0.0)
            for each in scored:
                rollouts = each.group.rollouts
                for rollout in rollouts:
                    versions = rollout.versions.tolist()
                    assert versions == sorted(versions) and versions[-1] <= step
                    windows.append((each.group.prompt.id, rollout.sample, step, rollout.trained, len(versions)))
                ages = [step - int(rollout.versions[rollout.trained]) for rollout in rollouts]
                trained.append((step, each.group.position, each.group.prompt.id, len(rollouts), max(ages)))
            bench.update_weights(step + 1)
            if step == saved_at:
                states = [bench.collector.state_dict()]
                dist.broadcast_object_list(states, src=0)
                kept = sum(rollout["tokens"].numel() for each in states[0]["carried"] for rollout in each["begun"])
                bench.collector = replaced(bench, config_after)
                bench.collector.load_state_dict(states[0])
        bench.collector.open.stop()
        state = bench.collector.state_dict()
        return {
            "trained": trained,
            "accounts": accounts,
            "open": [each["position"] for each in state["carried"]],
            "carried": counts["rollout/carried_prompts"],
            "kept": kept,
            "windows": windows,
            "restarted": restarted,
            "answered": answered,
        }


def replaced(bench: Bench, config: RolloutConfig) -> Any:
    """A new collector, as a run that is resumed has."""
    old = bench.collector
    bench.engine.detached = {}
    return type(old)(
        config,
        old.source,
        bench.graders,
        prompts=old.prompts,
        sampler=old.sampler,
        sampling=old.sampling,
        max_refill_rounds=old.max_refill_rounds,
    )


def collected(ranks: RankPool, folder: Path, config: RolloutConfig, **options: Any) -> tuple[list[Any], Balance, Any]:
    """What trained, by step and position, the balance of the ledger, and the results of all ranks."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"interruptions drawn with seed {seed}")
    world, asking = options.pop("world", 1), options.pop("asking", None)
    results = ranks.run(account, world, folder, config, seed, asking, options)
    assert all(each["accounts"] == results[0]["accounts"] for each in results)
    trained = sorted(each for result in results for each in result["trained"])
    found = balance(_lines(results[0]["accounts"], folder.parent))
    assert found.problems(results[0]["open"]) == []
    return trained, found, results


def _lines(accounts: list[Accounts], folder: Path) -> list[dict[str, Any]]:
    """The lines of a ledger file with these accounts."""
    ledger = Ledger(folder / "prompts.jsonl")
    ledger.open(from_step=0)
    for each in accounts:
        ledger.write(each)
    ledger.close()
    return [json.loads(line) for line in ledger.path.read_text().splitlines()]


def drawn(count: int) -> list[str]:
    rows = PromptSampler(400, 1, seed=3).draw(count)
    return [prompts(400)[row].id for row in rows]


IN_ORDER = RolloutConfig(ahead=1)
FIRST_COME = RolloutConfig(ahead=3, over_sampling=2.0, unfinished=Unfinished.keep_running)


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize(
    ("world", "asking"),
    [pytest.param(1, None, id="one rank", marks=pytest.mark.full), pytest.param(3, [0, 2], id="two of three ask")],
)
def test_batches_are_those_of_a_run_that_waits(ranks: RankPool, model: Path, ahead: int, world: int, asking: Any):
    """In order, nothing is left out, nothing too old, and the last steps begin nothing that would not train."""
    trained, found, results = collected(ranks, model, RolloutConfig(ahead=ahead), world=world, asking=asking)
    assert [(step, position) for step, position, *_ in trained] == [(s, p) for s in range(STEPS) for p in range(SIZE)]
    assert [name for _, _, name, _, _ in trained] == drawn(STEPS * SIZE), "groups train in the order of drawing"
    ages = [age for *_, age in trained]
    assert max(ages) <= ahead and any(ages), "some rollouts were begun before the last update"
    assert found.drawn == STEPS * SIZE and not found.open and not found.dropped
    assert results[0]["accounts"][0].drawn == (ahead + 1) * SIZE, "the first step begins the batches ahead"


def test_a_step_waits_for_its_own_batch_only(ranks: RankPool, model: Path):
    _, _, results = collected(ranks, model, RolloutConfig(ahead=2), world=2, faults={"in_order": True})
    for result in results:
        assert result["answered"] == [SIZE // 2 * (step + 1) for step in range(STEPS)]


@pytest.mark.parametrize("saved_at", [0, 3])
def test_what_is_generated_survives_a_checkpoint(ranks: RankPool, model: Path, saved_at: int):
    trained, found, results = collected(ranks, model, RolloutConfig(ahead=2), world=2, saved_at=saved_at)
    assert [name for _, _, name, _, _ in trained] == drawn(STEPS * SIZE)
    assert results[0]["kept"] > 0, "tokens are in the checkpoint"
    assert max(age for *_, age in trained) <= 2 and not found.open


@pytest.mark.parametrize("after", [0, 1])
def test_a_smaller_bound_holds_after_a_resume(ranks: RankPool, model: Path, after: int):
    """Prompts stay and train in order; what would be too old begins anew."""
    trained, found, results = collected(
        ranks, model, RolloutConfig(ahead=3), world=2, saved_at=1, after=RolloutConfig(ahead=after)
    )
    assert [name for _, _, name, _, _ in trained] == drawn(STEPS * SIZE)
    assert max(age for step, *_, age in trained if step > 1) <= after
    assert not found.open and not found.dropped
    restarted = {result["restarted"] for result in results}
    assert len(restarted) == 1 and (restarted != {0.0}) == (after > 0), "all ranks tell the number of all"


def test_a_larger_bound_fills_up_after_a_resume(ranks: RankPool, model: Path):
    trained, found, results = collected(
        ranks, model, RolloutConfig(ahead=0), world=2, saved_at=1, after=RolloutConfig(ahead=2)
    )
    assert [name for _, _, name, _, _ in trained] == drawn(STEPS * SIZE)
    assert not found.open and [each.drawn for each in results[0]["accounts"]] == [6, 12, 30, 36, 36, 36]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.full), 2])
def test_first_come_leaves_nothing_behind(ranks: RankPool, model: Path, world: int):
    trained, found, results = collected(ranks, model, FIRST_COME, world=world, saved_at=2)
    assert [(step, position) for step, position, *_ in trained] == [(s, p) for s in range(STEPS) for p in range(SIZE)]
    assert max(age for *_, age in trained) <= 3
    names = [name for _, _, name, _, _ in trained]
    assert len(set(names)) == len(names) and names != drawn(len(names)), "those that finished first went first"
    assert not found.dropped and len(found.open) == results[0]["carried"]


@pytest.mark.parametrize(
    "config", [RolloutConfig(ahead=1, max_refill_rounds=3), replace(FIRST_COME, max_refill_rounds=2)]
)
def test_zero_advantage_groups_are_replaced_and_named(ranks: RankPool, model: Path, config: RolloutConfig):
    trained, found, _ = collected(ranks, model, config, world=2, asking=[0, 1], saved_at=2)
    assert [(step, position) for step, position, *_ in trained] == [(s, p) for s in range(STEPS) for p in range(SIZE)]
    assert max(age for *_, age in trained) <= config.ahead
    assert set(found.dropped.values()) == {"zero_advantage"}


def test_windows_go_on_behind_the_batches_ahead(ranks: RankPool, model: Path):
    """What a window trained goes on in a later batch, and every rollout comes to its end."""
    trained, found, results = collected(ranks, model, RolloutConfig(ahead=1, window_tokens=2), world=2, saved_at=2)
    assert all(age <= 1 for *_, age in trained)
    steps_of: dict[str, list[int]] = {}
    for step, _, name, count, _ in trained:
        assert count <= SAMPLES
        steps_of.setdefault(name, []).append(step)
    spans: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for name, sample, _, start, end in sorted(each for result in results for each in result["windows"]):
        spans.setdefault((name, sample), []).append((start, end))
    assert any(len(each) > 1 for each in spans.values())
    for each in spans.values():
        assert [start for start, _ in each] == [0, *(end for _, end in each[:-1])], "every token trains once, in order"
        assert all(0 < end - start <= 2 for start, end in each)
    assert all(steps[0] % 2 == last % 2 for steps in steps_of.values() for last in steps), "every second batch"
    assert len(found.trained) > SIZE and len(found.open) > 0 and results[0]["carried"] > 0


# ---------------------------------------------------------------- lengths


class Clockwork:
    """An engine that needs a tick for each token of a group's longest rollout, and goes on while the caller trains.

    Lengths are wide, and a function of prompt and sample; each token has the version of the weights of its time.
    """

    TRAINING = 120  # ticks of a step in which the caller trains

    def __init__(self) -> None:
        self.now, self.open = 0, {}
        self.updates = [(0, 0)]

    def load_weights(self, version: int) -> None:
        self.updates.append((self.now, version))

    def take_statistics(self) -> dict[str, float]:
        return {}

    def generate(self, requests: Any, params: SamplingParams, **_: Any) -> Clockwork:
        for request in requests:
            self.open[request.position] = (self.now, request, [self.length(request, each) for each in range(SAMPLES)])
        return self

    def length(self, request: Request, sample: int) -> int:
        return int(math.exp(random.Random(f"{request.prompt.id}/{sample}").gauss(3.5, 1.0))) + 1

    def __iter__(self) -> Clockwork:
        return self

    def __next__(self) -> RolloutGroup:
        if not self.open:
            raise StopIteration
        began, request, lengths = self.open.pop(min(self.open, key=lambda each: self._end(self.open[each])))
        self.now = max(self.now, began + max(lengths))
        return self._group(began, request, lengths)

    def _group(self, began: int, request: Request, lengths: list[int]) -> RolloutGroup:
        rollouts = [self._rollout(sample, length, began) for sample, length in enumerate(lengths)]
        return RolloutGroup(request.position, request.prompt, rollouts)

    def _end(self, entry: tuple[int, Request, list[int]]) -> int:
        return entry[0] + max(entry[2])

    def _rollout(self, sample: int, length: int, began: int) -> Rollout:
        versions = [max(version for tick, version in self.updates if tick <= began + each) for each in range(length)]
        zeros = torch.zeros(length)
        return Rollout(zeros.long(), zeros, "", "stop", torch.tensor(versions), sample)

    def detach(self, on_group: Any) -> None:
        self.now += self.TRAINING
        for entry in self.open.values():
            if self._end(entry) <= self.now:
                on_group(self._group(*entry))

    def close(self) -> None:
        self.open = {}


def lengths_of(config: RolloutConfig, steps: int) -> tuple[list[float], float, int, float]:
    """The mean length of what trains in each step, the largest age, the ticks that the run took, and the share of the
    groups that were graded while the caller trained."""
    engine, sampler = Clockwork(), PromptSampler(400, SIZE, seed=3)
    collector = Collector(
        config,
        RolloutSource(engine, [0], lambda: None),
        graders(),
        prompts=prompts(400),
        sampler=sampler,
        sampling=SamplingParams(samples=SAMPLES, max_new_tokens=10_000, seed=7),
        max_refill_rounds=0,
    )
    means, ages, early = [], [], 0
    for step in range(steps):
        early += len(collector.grades._begun)
        scored, _ = collector.collect(step)
        rollouts = [rollout for each in scored for rollout in each.group.rollouts]
        means.append(sum(each.tokens.numel() for each in rollouts) / len(rollouts))
        ages += [step - each.version for each in rollouts]
        if not engine.open:
            engine.now += engine.TRAINING
        engine.load_weights(step + 1)
    return means, max(ages), engine.now, early / (steps * SIZE)


def test_what_trains_is_not_shorter_for_being_begun_ahead(ranks: RankPool):
    """In order, each step trains the lengths of a run that waits; first come, the first step trains shorter ones."""
    steps = 50
    waiting, _, longest, early = ranks.run(lengths_of, 1, RolloutConfig(), steps)[0]
    assert not early
    for ahead in (1, 3):
        means, age, ticks, early = ranks.run(lengths_of, 1, RolloutConfig(ahead=ahead), steps)[0]
        assert means == waiting and 0 < age <= ahead and ticks < 0.8 * longest and early > 0.3
    means, age, *_ = ranks.run(lengths_of, 1, FIRST_COME, steps)[0]
    assert 0 < age <= 3 and means[0] < 0.8 * waiting[0]
    print(f"first come: {sum(means) / sum(waiting) - 1:+.1%} in length over {steps} steps")


def with_the_local_engine(folder: Path, ahead: int) -> dict[str, Any]:
    """On a rank: what trained when, with an engine whose thread generates between the steps."""
    trained: list[Any] = []
    with Bench(folder, RolloutConfig(ahead=ahead)) as bench:
        for step in range(STEPS):
            scored, _ = bench.collector.collect(step, last=STEPS - 1)
            for each in scored:
                versions = [rollout.versions for rollout in each.group.rollouts]
                age = step - min(int(each.min()) for each in versions)
                trained.append((step, each.group.position, each.group.prompt.id, len(versions), age))
            bench.update_weights(step + 1)
            if step == 2:
                bench.collector.open.stop()  # as before an evaluation
    return {"trained": trained, "threads": [each.name for each in threading.enumerate() if "rollouts" in each.name]}


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_local_engine_generates_while_its_caller_trains(ranks: RankPool, model: Path, ahead: int):
    results = ranks.run(with_the_local_engine, 2, model, ahead)
    trained = sorted(each for result in results for each in result["trained"])
    assert [name for _, _, name, _, _ in trained] == drawn(STEPS * SIZE), "groups train in the order of drawing"
    ages = [age for *_, age in trained]
    assert max(ages) <= ahead and any(ages) and not any(result["threads"] for result in results)
