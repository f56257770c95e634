"""The collector with an engine that is lost, stopped or left running: no prompt is lost or used twice."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collector_steps import COUNTS, NEW_TOKENS, Bench, facts, prompts
from interrupted_engine import InterruptedEngine
from ranks import RankError, RankPool
from small_runs import write_model

from clipo_megatron.checkpoint import CheckpointContents, CheckpointItem, Checkpoints
from clipo_megatron.config.schema import CheckpointConfig, RolloutConfig, Unfinished
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import Rollout, RolloutGroup
from clipo_megatron.rollout.engine import Cancelled, EngineError, Request, SamplingParams, never
from clipo_megatron.training.group_buffer import has_reward_variance
from clipo_megatron.training.partial_rollouts import is_complete


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


# ---------------------------------------------------------------- an engine that is interrupted


def account(folder: Path, config: RolloutConfig, seed: int, rollout_ranks: list[int] | None) -> dict[str, Any]:
    """On a rank: some steps with an engine that is lost, stopped and left at random; what became of every prompt."""
    world = dist.get_world_size()
    asks = rollout_ranks is None or dist.get_rank() in rollout_ranks
    faults = {"seed": seed * 100 + dist.get_rank(), "loss": 0.1, "limit": 3}
    with Bench(folder, config, rollout_ranks=rollout_ranks, interrupted=faults) as bench:
        trained, mixed, totals, prefixes = [], [], Counter(), 0
        for step in range(4):
            bench.engine.losses = 0
            had = {each.prompt.id: each for each in bench.collector.open.carried}
            scored, counts = bench.collector.collect(step)
            totals.update({name: counts[f"rollout/{name}"] for name in COUNTS})
            for each in scored:
                trained.append((step, each.group.position, each.group.prompt.id))
                mixed.append(has_reward_variance(each))
                begun = {rollout.sample: rollout for rollout in had.get(each.group.prompt.id, Request(0, None)).begun}
                for rollout in each.group.rollouts:
                    check_rollout(rollout, step)
                    if rollout.sample in begun:
                        prefixes += goes_on_from(rollout, begun[rollout.sample])
            bench.update_weights(step + 1)
        assert asks or not (trained or bench.engine.asked)
        carried = [each.prompt.id for each in (*bench.collector.open.carried, *bench.collector.open.running)]
        assert sum(each.total() for each in bench.collector._open_by) == counts["rollout/carried_prompts"]
        drawn = [prompts(400)[row].id for row in PromptSampler(400, 1, seed=3).draw(bench.sampler.offset)]
        return {
            "world": world,
            "trained": trained,
            "mixed": mixed,
            "carried": carried,
            "carried last": counts["rollout/carried_prompts"],
            "drawn": drawn,
            "asked": Counter(bench.engine.asked),
            "totals": totals,
            "prefixes": prefixes,
            "recoveries": bench.recoveries,
            "resumed": bench.engine.resumed,
            "stops": bench.engine.stops,
        }


def check_rollout(rollout: Rollout, step: int) -> None:
    versions = rollout.versions.tolist()
    assert versions == sorted(versions) and versions[-1] <= step
    assert len(versions) == rollout.tokens.numel() == rollout.logprobs.numel() <= NEW_TOKENS
    assert rollout.finish in ("stop", "length")


def goes_on_from(rollout: Rollout, begun: Rollout) -> bool:
    """Whether a rollout that was begun before this step kept its tokens, and their versions; it must have."""
    kept = begun.tokens.numel()
    assert rollout.tokens[:kept].tolist() == begun.tokens.tolist()
    assert rollout.versions[:kept].tolist() == begun.versions.tolist()
    return True


SETTINGS = {
    "plain": RolloutConfig(),
    "drop": RolloutConfig(over_sampling=1.5),
    "resume": RolloutConfig(over_sampling=1.7, unfinished=Unfinished.resume),
    "keep running": RolloutConfig(over_sampling=1.7, unfinished=Unfinished.keep_running),
    "refill": RolloutConfig(max_refill_rounds=2),
    "refill, drop": RolloutConfig(over_sampling=1.5, max_refill_rounds=2),
    "refill, resume": RolloutConfig(over_sampling=2.0, max_refill_rounds=2, unfinished=Unfinished.resume),
    "refill, keep running": RolloutConfig(over_sampling=2.0, max_refill_rounds=2, unfinished=Unfinished.keep_running),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("world", "rollout_ranks"),
    [pytest.param(1, None, id="one rank", marks=pytest.mark.full), pytest.param(3, [0, 2], id="two of three ask")],
)
def test_every_prompt_is_accounted_for_once(ranks: RankPool, model: Path, name: str, world: int, rollout_ranks: Any):
    config, seed = SETTINGS[name], random.SystemRandom().randrange(10**6)
    print(f"interruptions drawn with seed {seed}")
    results = ranks.run(account, world, model, config, seed, rollout_ranks)
    first = results[0]
    assert all(each["totals"] == first["totals"] and each["drawn"] == first["drawn"] for each in results)
    trained = [each for result in results for each in result["trained"]]
    carried = [name for result in results for name in result["carried"]]

    assert sorted((step, position) for step, position, _ in trained) == [(s, p) for s in range(4) for p in range(6)]
    ids = [name for _, _, name in trained]
    assert len(set(ids)) == len(ids) and len(set(carried)) == len(carried)
    assert not set(ids) & set(carried)
    drawn, totals = first["drawn"], first["totals"]
    assert len(set(drawn)) == len(drawn) and set(ids) | set(carried) <= set(drawn)
    assert len(carried) == first["carried last"]
    assert len(drawn) == len(ids) + len(carried) + totals["dropped_prompts"] + totals["discarded_groups"]
    assert len({result["recoveries"] for result in results}) == 1, "all ranks come to every recovery, or none"
    assert first["recoveries"] == totals["recoveries"]

    carries = config.unfinished is not Unfinished.drop
    if config.over_sampling == 1.0:
        assert totals["dropped_prompts"] == len(carried) == 0
    else:
        assert (totals["dropped_prompts"] > 0) == (not carries) or config.max_refill_rounds
        assert carries or not carried
    assert (totals["refilled_groups"] > 0) <= bool(config.max_refill_rounds)
    if config.max_refill_rounds:
        assert sum(sum(result["mixed"]) for result in results) > 0


def test_every_kind_of_interruption_happens(ranks: RankPool, model: Path):
    """What the accounts above are worth: with these seeds every kind of interruption is there."""
    config = replace(SETTINGS["resume"])
    runs = [ranks.run(account, 1, model, config, seed, None)[0] for seed in range(4)]
    for name in ("recoveries", "resumed", "stops", "prefixes"):
        assert sum(run[name] for run in runs) > 0, name
    assert max(max(run["asked"].values()) for run in runs) > 1, "no request was ever sent twice"
    plain = [ranks.run(account, 1, model, SETTINGS["plain"], seed, None)[0] for seed in range(4)]
    assert sum(run["resumed"] for run in plain) > 0, "what a lost engine had done was not gone on from"


def lost_for_good(folder: Path, deadline_s: float, rollout_ranks: list[int] | None = None) -> tuple[int, str]:
    """On a rank; rank 0's engine is lost whatever is done."""
    loss = 1.0 if dist.get_rank() == 0 else 0.0
    config = RolloutConfig(deadline_s=deadline_s)
    with Bench(folder, config, rollout_ranks=rollout_ranks, interrupted={"seed": 0, "loss": loss}) as bench:
        with pytest.raises(EngineError) as caught:
            bench.collector.collect(0)
        return bench.recoveries, str(caught.value)


def test_an_engine_that_stays_lost_ends_the_run_on_all_ranks(ranks: RankPool, model: Path):
    (tried, why), (tried_too, why_too) = ranks.run(lost_for_good, 2, model, 60.0)
    assert tried == tried_too == 8
    assert "lost on purpose" in why and "that was loss 9" in why and "Look at the servers' logs" in why
    assert "another rank lost its engine" in why_too
    (tried, why), _ = ranks.run(lost_for_good, 2, model, 0.0, [0])
    assert tried == 0 and "rollout.deadline_s has passed" in why


class Parrot(InterruptedEngine):
    """Answers one request twice."""

    def generate(self, requests: Any, params: SamplingParams, *, deadline_s: float, should_cancel: Any) -> Any:
        groups = list(super().generate(requests, params, deadline_s=deadline_s, should_cancel=should_cancel))
        return iter([groups[0], *groups[:-1]])


class Mumbler(InterruptedEngine):
    """Gives a group with a rollout missing."""

    def complete(self, request: Request, params: SamplingParams, deadline_s: float) -> RolloutGroup:
        group = super().complete(request, params, deadline_s)
        return replace(group, rollouts=group.rollouts[:-1])


class Sleeper(InterruptedEngine):
    """Leaves a request out."""

    def generate(self, requests: Any, params: SamplingParams, *, deadline_s: float, should_cancel: Any) -> Any:
        return iter(list(super().generate(requests, params, deadline_s=deadline_s, should_cancel=should_cancel))[:-1])


def untrue(folder: Path, kind: type[InterruptedEngine]) -> None:
    with Bench(folder, RolloutConfig(), interrupted={"seed": 0}) as bench:
        bench.collector.source.engine = kind(bench.engine.engine, 0)
        bench.collector.collect(0)


@pytest.mark.parametrize(
    ("kind", "part"),
    [(Parrot, "answered twice, or never asked"), (Mumbler, "with 3 rollouts"), (Sleeper, "without an answer to p/")],
)
def test_an_engine_that_miscounts_is_refused(ranks: RankPool, model: Path, kind: type[InterruptedEngine], part: str):
    with pytest.raises(RankError, match=part):
        ranks.run(untrue, 1, model, kind)


# ---------------------------------------------------------------- a step that is given up


def should_cancel(folder: Path, config: RolloutConfig, who: int | None) -> Any:
    """On a rank: the third of three steps, which rank `who` gives up first after some groups, if anybody does."""
    with Bench(folder, config, interrupted={"seed": 1}) as bench:
        for step in range(2):
            bench.collector.collect(step)
            bench.update_weights(step + 1)
        if config.unfinished is Unfinished.keep_running:
            bench.collector.open.stop()  # as before a checkpoint that is to hold what was generated
        before = bench.sampler.state_dict(), bench.collector.state_dict()
        if who is not None:
            answered = len(bench.engine.answered)
            bench.collector.source.should_cancel = lambda: (
                dist.get_rank() == who and len(bench.engine.answered) > answered
            )
            with pytest.raises(Cancelled):
                bench.collector.collect(2)
            assert (dist.get_rank() == who) <= (len(bench.engine.answered) > answered), "groups are thrown away"
            assert _comparable(before) == _comparable((bench.sampler.state_dict(), bench.collector.state_dict()))
            bench.collector.source.should_cancel = never
        scored, counts = bench.collector.collect(2)
        # Which of too many groups finish first is drawn from the engine's seed, and differs.
        return (facts(scored), counts["rollout/rounds"]) if config.over_sampling == 1.0 else None


def _comparable(state: tuple[Any, Any]) -> Any:
    sampler, rollouts = state
    carried = [
        (each["id"], [(facts["sample"], facts["tokens"].tolist()) for facts in each["begun"]])
        for each in rollouts["carried"]
    ]
    return sampler, carried


@pytest.mark.parametrize("world", [*(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 2)), 3])
@pytest.mark.parametrize("name", ["plain", "refill", "refill, resume", "keep running"])
def test_a_cancelled_step_leaves_no_trace(ranks: RankPool, model: Path, world: int, name: str):
    undisturbed = ranks.run(should_cancel, world, model, SETTINGS[name], None)
    assert ranks.run(should_cancel, world, model, SETTINGS[name], world - 1) == undisturbed


# ---------------------------------------------------------------- what is carried over


def save_carried(folder: Path, config: RolloutConfig, checkpoints: Path, left_open: bool) -> list[Any]:
    with Bench(folder, config, interrupted={"seed": 1}) as bench:
        bench.collector.collect(0)
        if left_open:
            bench.collector.open.stop()
            bench.collector.open.stop()
        _checkpoints(bench, checkpoints).save(1)
        carried = sorted([*bench.collector.open.carried, *bench.collector.open.running], key=lambda each: each.position)
        return [(each.prompt.id, begun_facts(each)) for each in carried]


def load_carried(folder: Path, config: RolloutConfig, checkpoints: Path) -> tuple[list[Any], list[str]]:
    with Bench(folder, config, interrupted={"seed": 2}) as bench:
        _checkpoints(bench, checkpoints).load(checkpoints / "step_000001")
        carried = [(each.position, each.prompt.id, begun_facts(each)) for each in bench.collector.open.carried]
        scored, _ = bench.collector.collect(1)
        later = [each.prompt.id for each in (*bench.collector.open.carried, *bench.collector.open.running)]
        return carried, [each.group.prompt.id for each in scored] + later


def begun_facts(request: Request) -> list[Any]:
    return [(each.sample, each.finish, each.tokens.tolist(), each.versions.tolist()) for each in request.begun]


def _checkpoints(bench: Bench, folder: Path) -> Checkpoints:
    main = dist.get_rank() == 0
    collector = bench.collector
    items = [
        CheckpointItem("sampler", bench.sampler, writes=main),
        CheckpointItem("rollouts", collector, writes=main, gathers=True, optional=True),
    ]
    return Checkpoints(folder, CheckpointContents(items), CheckpointConfig(asynchronous=False))


@pytest.mark.parametrize("name", ["resume", "keep running", "withdrawn"])
def test_carried_rollouts_survive_in_any_number_of_ranks(ranks: RankPool, model: Path, tmp_path: Path, name: str):
    config = SETTINGS["resume" if name == "resume" else "keep running"]
    saved = [each for part in ranks.run(save_carried, 2, model, config, tmp_path, name == "withdrawn") for each in part]
    assert len(saved) >= 4
    assert any(begun for _, begun in saved) == (name != "keep running")
    for world in (1, 2, 3):
        results = ranks.run(load_carried, world, model, config, tmp_path)
        loaded = sorted(each for carried, _ in results for each in carried)
        assert len({position for position, _, _ in loaded}) == len(saved)
        assert sorted(each[1:] for each in loaded) == sorted(saved)
        after = [name for _, names in results for name in names]
        assert len(set(after)) == len(after)
        assert {name for name, _ in saved} <= set(after)
    # without a setting that carries them over, the prompts are not lost: they are asked for anew
    carried, after = ranks.run(load_carried, 1, model, RolloutConfig(), tmp_path)[0]
    assert [begun for _, _, begun in carried] == [[]] * len(saved)
    assert {name for name, _ in saved} <= set(after) and len(after) == 6


def begin_with_complete_groups(folder: Path) -> Any:
    """More groups are carried over complete than a step needs."""
    with Bench(folder, RolloutConfig(), size=8) as bench:
        scored, _ = bench.collector.collect(0)
        whole = [Request(each.group.position, each.group.prompt, tuple(each.group.rollouts)) for each in scored]
        bench.collector.open.carried = whole
        state, place = bench.collector.state_dict(), bench.sampler.state_dict()
    with Bench(folder, SETTINGS["resume"], interrupted={"seed": 0}) as bench:
        bench.collector.load_state_dict(state)
        bench.sampler.load_state_dict(place)
        first, counts = bench.collector.collect(1)
        asked = list(bench.engine.asked)
        left = [each.prompt.id for each in bench.collector.open.carried]
        second, _ = bench.collector.collect(2)
        return facts(scored), facts(first), asked, counts, left, facts(second)


def test_complete_groups_are_taken_without_an_engine(ranks: RankPool, model: Path):
    before, first, asked, counts, left, second = ranks.run(begin_with_complete_groups, 1, model)[0]
    assert first == before[:6] and asked == []
    assert counts["rollout/discarded_groups"] == counts["rollout/dropped_prompts"] == 0
    assert {group[1] for group in before[6:]} <= set(left)
    assert [group[1:] for group in second if group[1] in left[:2]] == [group[1:] for group in before[6:]]


def test_only_complete_groups_wait_without_an_engine():
    def rollout(sample: int, finish: Any) -> Rollout:
        return Rollout(torch.zeros(1).long(), torch.zeros(1), "", finish, torch.zeros(1).long(), sample)

    request = Request(0, prompts(1)[0], (rollout(0, "stop"), rollout(1, "length")))
    assert is_complete(request, 2) and not is_complete(request, 3)
    assert not is_complete(request._replace(begun=(rollout(0, "stop"), rollout(1, "abort"))), 2)
