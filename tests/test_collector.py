"""A step's groups: which prompts are asked, which groups train, and what becomes of the others."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interrupted_engine import InterruptedEngine
from ranks import RankError, RankPool
from safetensors.torch import load_file
from small_runs import FAVOURITE, write_model

from clipo_megatron.checkpoint import Checkpoints, Owner
from clipo_megatron.collector import Collector, _Tally, choose, deal, is_whole, oversampled, share, teaches
from clipo_megatron.config.schema import RewardConfig, RolloutConfig, Unfinished
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup, ScoredGroup, Verdict
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import EngineError, Request, SamplingParams
from clipo_megatron.rollout.local import LocalEngine

pytestmark = pytest.mark.timeout(300)

SAMPLES, NEW_TOKENS = 4, 5
COUNTS = ("refilled_groups", "discarded_groups", "dropped_prompts", "carried_prompts", "rounds", "recoveries")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


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
    """Of this process: starting one takes longer than most cases."""
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
        askers: list[int] | None = None,
        interrupted: dict[str, Any] | None = None,
    ):
        self.weights = load_file(folder / "model.safetensors")
        local = LocalEngine(folder, dtype=torch.float32, device="cpu", batch_size=32)
        self.engine: Any = InterruptedEngine(local, **interrupted) if interrupted is not None else local
        self.push(0)
        self.graders = graders()
        self.sampler = PromptSampler(problems, size, seed=3)
        self.recoveries = 0
        self.collector = Collector(
            config,
            prompts=prompts(problems),
            sampler=self.sampler,
            engine=self.engine,
            graders=self.graders,
            sampling=SamplingParams(samples=SAMPLES, max_new_tokens=NEW_TOKENS, stop_ids=(1,), seed=7),
            askers=list(range(dist.get_world_size())) if askers is None else askers,
            recover=self.recover,
        )

    def push(self, version: int) -> None:
        self.engine.load_weights(self.weights.items(), version=version)

    def recover(self) -> None:
        self.recoveries += 1
        dist.all_reduce(torch.zeros(1))  # collective, as a push is: all ranks come, or the case times out
        self.push(self.engine.version)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.graders.collect()  # a case that raised may have left some
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
    """On a rank: `steps` steps, weights updated after each."""
    with Bench(folder, config, **options) as bench:
        batches, metrics = [], []
        for step in range(steps):
            scored, counts = bench.collector.collect(step)
            batches.append(facts(scored))
            metrics.append({name: counts[f"rollout/{name}"] for name in COUNTS})
            bench.push(step + 1)
        state = bench.sampler.state_dict()
        return {"batches": batches, "metrics": metrics, "drawn": state["epoch"] * 400 + state["offset"]}


def merged(results: list[dict[str, Any]]) -> list[list[Any]]:
    """The steps' groups of all ranks, by position; every rank must have counted the same."""
    for name in ("metrics", "drawn"):
        assert all(each[name] == results[0][name] for each in results)
    steps = zip(*(each["batches"] for each in results), strict=True)
    return [sorted(group for part in step for group in part) for step in steps]


# ---------------------------------------------------------------- one page of rules


def test_prompts_are_dealt_in_turn():
    assert deal([2, 1, 3]) == [0, 1, 2, 0, 2, 2]
    assert deal([]) == deal([0, -2]) == []
    for world, count in [(1, 5), (3, 7), (4, 3)]:
        room = [share(count, range(world), rank) for rank in range(world)]
        assert deal(room) == [index % world for index in range(count)]
    assert share(5, [0, 2], 1) == 0
    assert [share(5, [0, 2], rank) for rank in (0, 2)] == [3, 2]


def test_over_sampling_asks_for_whole_prompts():
    assert [oversampled(10, factor) for factor in (1.0, 1.1, 1.11, 1.5, 2.0)] == [10, 11, 12, 15, 20]
    assert [oversampled(quota, 1.5) for quota in (0, 1, 2, 3)] == [0, 2, 3, 5]


def test_groups_that_teach_come_first():
    groups = {7: (0, False), 2: (1, True), 5: (0, False), 9: (1, True), 3: (0, True)}
    assert choose(groups, 2) == ({2: 0, 3: 1}, [9])
    assert choose(groups, 3) == ({2: 0, 3: 1, 9: 2}, [])
    assert choose(groups, 4) == ({2: 0, 3: 1, 5: 2, 9: 3}, [])


def test_no_round_begins_that_would_miss_the_deadline():
    assert _Tally().has_time(0.0), "the first round always begins"
    assert _Tally(spent_s=[4.0]).has_time(8.1) and not _Tally(spent_s=[4.0]).has_time(8.0)
    assert _Tally(spent_s=[1.0, 4.0, 5.0]).has_time(8.1) and not _Tally(spent_s=[1.0, 4.0, 5.0]).has_time(7.9)


def test_a_group_teaches_with_right_and_wrong():
    def scored(*correct: bool | None) -> ScoredGroup:
        return ScoredGroup(RolloutGroup(0, prompts(1)[0], []), [Verdict(each, 0.0) for each in correct])

    assert teaches(scored(True, False, None))
    assert not any(teaches(scored(*each)) for each in [(True, True), (False, None), (True, None), (None, None), ()])


# ---------------------------------------------------------------- a local engine


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_plain_step_asks_what_the_sampler_says(ranks: RankPool, model: Path, world: int):
    results = ranks.run(run_steps, world, model, RolloutConfig(), 2, {})
    sampler, known = PromptSampler(400, 6, seed=3), prompts(400)
    for groups, counts in zip(merged(results), results[0]["metrics"], strict=True):
        assert [group[:2] for group in groups] == [(i, known[row].id) for i, row in enumerate(sampler.next())]
        assert counts == dict.fromkeys(COUNTS, 0.0) | {"rounds": 1.0}
    assert [len(part["batches"][0]) for part in results] == [6 // world] * world


def dynamic_sampling_by_hand(folder: Path, size: int, rounds: int) -> list[Any]:
    """On one rank: what a step keeps, from everything generated one prompt at a time."""
    with Bench(folder, RolloutConfig()) as bench:
        params = replace(bench.collector.sampling, step=0)
        found: list[tuple[Any, bool]] = []
        for _ in range(rounds + 1):
            missing = size - sum(mixed for _, mixed in found)
            for index in bench.sampler.draw(missing):
                request = Request(len(found), bench.collector.prompts[index])
                bench.graders.submit(next(bench.engine.generate([request], params, deadline_s=60)))
                (scored,) = bench.graders.collect()
                verdicts = {verdict.correct for verdict in scored.verdicts}
                found.append((facts([scored])[0], verdicts == {True, False}))
            if all(mixed for _, mixed in found):
                break
    kept = [group for group, mixed in found if mixed][:size]
    kept += [group for group, mixed in found if not mixed][: size - len(kept)]
    return [sorted(kept), len(found)]


@pytest.mark.parametrize("rounds", [1, 6])
def test_groups_that_teach_nothing_are_replaced(ranks: RankPool, model: Path, rounds: int):
    (expected, asked), *_ = ranks.run(dynamic_sampling_by_hand, 1, model, 6, rounds)
    mixed = sum(len(set(group[3])) == 2 for group in expected)
    assert (mixed < 6) == (rounds == 1), "the cap and the way to a full batch are both to be seen"
    config = RolloutConfig(refill_rounds=rounds)
    for world in (1, 2, 3):
        results = ranks.run(run_steps, world, model, config, 1, {})
        (groups,), (counts,) = merged(results), results[0]["metrics"]
        assert [group[1:] for group in groups] == [group[1:] for group in expected]
        assert [group[0] for group in groups] == list(range(6))
        assert (counts["refilled_groups"], counts["discarded_groups"]) == (asked - 6, asked - 6)
        assert results[0]["drawn"] == asked
        assert 2 <= counts["rounds"] <= rounds + 1


@pytest.mark.parametrize("world", [1, 2])
def test_the_first_to_finish_are_taken(ranks: RankPool, model: Path, world: int):
    results = ranks.run(run_steps, world, model, RolloutConfig(over_sampling=1.5), 3, {})
    steps, asked = merged(results), 9 if world == 1 else 10
    assert [[group[0] for group in groups] for groups in steps] == [list(range(6))] * 3
    assert [counts["dropped_prompts"] for counts in results[0]["metrics"]] == [asked - 6] * 3
    assert results[0]["drawn"] == 3 * asked
    assert len({group[1] for groups in steps for group in groups}) == 18
    # the local engine begins with the longest prompts, so that a batch is not the first ones drawn
    sampler = PromptSampler(400, 6, seed=3)
    assert [group[1] for group in steps[0]] != [f"p/{row}" for row in sampler.next()]


# ---------------------------------------------------------------- an engine that is interrupted


def account(folder: Path, config: RolloutConfig, seed: int, askers: list[int] | None) -> dict[str, Any]:
    """On a rank: some steps with an engine that is lost, stopped and left at random; what became of every prompt."""
    world = dist.get_world_size()
    asks = askers is None or dist.get_rank() in askers
    faults = {"seed": seed * 100 + dist.get_rank(), "loss": 0.1, "limit": 3}
    with Bench(folder, config, askers=askers, interrupted=faults) as bench:
        trained, mixed, totals, prefixes = [], [], Counter(), 0
        for step in range(4):
            bench.engine.losses = 0
            had = {each.prompt.id: each for each in bench.collector._carried}
            scored, counts = bench.collector.collect(step)
            totals.update({name: counts[f"rollout/{name}"] for name in COUNTS})
            for each in scored:
                trained.append((step, each.group.position, each.group.prompt.id))
                mixed.append(teaches(each))
                begun = {rollout.sample: rollout for rollout in had.get(each.group.prompt.id, Request(0, None)).begun}
                for rollout in each.group.rollouts:
                    check_rollout(rollout, step)
                    if rollout.sample in begun:
                        prefixes += goes_on_from(rollout, begun[rollout.sample])
            bench.push(step + 1)
        assert asks or not (trained or bench.engine.asked)
        carried = [each.prompt.id for each in (*bench.collector._carried, *bench.collector._running)]
        assert sum(bench.collector._carried_by) == counts["rollout/carried_prompts"]
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
    "refill": RolloutConfig(refill_rounds=2),
    "refill, drop": RolloutConfig(over_sampling=1.5, refill_rounds=2),
    "refill, resume": RolloutConfig(over_sampling=2.0, refill_rounds=2, unfinished=Unfinished.resume),
    "refill, keep running": RolloutConfig(over_sampling=2.0, refill_rounds=2, unfinished=Unfinished.keep_running),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("world", "askers"), [(1, None), (3, [0, 2])], ids=["one rank", "two of three ask"])
def test_every_prompt_is_accounted_for_once(ranks: RankPool, model: Path, name: str, world: int, askers: Any):
    config, seed = SETTINGS[name], random.SystemRandom().randrange(10**6)
    print(f"interruptions drawn with seed {seed}")
    results = ranks.run(account, world, model, config, seed, askers)
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
        assert (totals["dropped_prompts"] > 0) == (not carries) or config.refill_rounds
        assert carries or not carried
    assert (totals["refilled_groups"] > 0) <= (config.refill_rounds > 0)
    if config.refill_rounds:
        assert sum(sum(result["mixed"]) for result in results) > 0


def test_the_faults_happen(ranks: RankPool, model: Path):
    """What the accounts above are worth: with these seeds every kind of interruption is there."""
    config = replace(SETTINGS["resume"])
    runs = [ranks.run(account, 1, model, config, seed, None)[0] for seed in range(4)]
    for name in ("recoveries", "resumed", "stops", "prefixes"):
        assert sum(run[name] for run in runs) > 0, name
    assert max(max(run["asked"].values()) for run in runs) > 1, "no request was ever sent twice"
    plain = [ranks.run(account, 1, model, SETTINGS["plain"], seed, None)[0] for seed in range(4)]
    assert sum(run["resumed"] for run in plain) > 0, "what a lost engine had done was not gone on from"


def lost_for_good(folder: Path, deadline_s: float, askers: list[int] | None = None) -> tuple[int, str]:
    """On a rank; rank 0's engine is lost whatever is done."""
    loss = 1.0 if dist.get_rank() == 0 else 0.0
    config = RolloutConfig(deadline_s=deadline_s)
    with Bench(folder, config, askers=askers, interrupted={"seed": 0, "loss": loss}) as bench:
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

    def generate(self, requests: Any, params: SamplingParams, *, deadline_s: float) -> Any:
        groups = list(super().generate(requests, params, deadline_s=deadline_s))
        return iter([groups[0], *groups[:-1]])


class Mumbler(InterruptedEngine):
    """Gives a group with a rollout missing."""

    def complete(self, request: Request, params: SamplingParams, deadline_s: float) -> RolloutGroup:
        group = super().complete(request, params, deadline_s)
        return replace(group, rollouts=group.rollouts[:-1])


class Sleeper(InterruptedEngine):
    """Leaves a request out."""

    def generate(self, requests: Any, params: SamplingParams, *, deadline_s: float) -> Any:
        return iter(list(super().generate(requests, params, deadline_s=deadline_s))[:-1])


def untrue(folder: Path, kind: type[InterruptedEngine]) -> None:
    with Bench(folder, RolloutConfig(), interrupted={"seed": 0}) as bench:
        bench.collector.engine = kind(bench.engine.engine, 0)
        bench.collector.collect(0)


@pytest.mark.parametrize(
    ("kind", "part"),
    [(Parrot, "answered twice, or never asked"), (Mumbler, "with 3 rollouts"), (Sleeper, "without an answer to p/")],
)
def test_an_engine_that_miscounts_is_refused(ranks: RankPool, model: Path, kind: type[InterruptedEngine], part: str):
    with pytest.raises(RankError, match=part):
        ranks.run(untrue, 1, model, kind)


# ---------------------------------------------------------------- what is carried over


def save_carried(folder: Path, config: RolloutConfig, checkpoints: Path, left_open: bool) -> list[Any]:
    with Bench(folder, config, interrupted={"seed": 1}) as bench:
        bench.collector.collect(0)
        if left_open:
            bench.collector.withdraw()
            bench.collector.withdraw()
        _checkpoints(bench, checkpoints).save(1)
        carried = sorted([*bench.collector._carried, *bench.collector._running], key=lambda each: each.position)
        return [(each.prompt.id, begun_facts(each)) for each in carried]


def load_carried(folder: Path, config: RolloutConfig, checkpoints: Path) -> tuple[list[Any], list[str]]:
    with Bench(folder, config, interrupted={"seed": 2}) as bench:
        _checkpoints(bench, checkpoints).load(checkpoints / "step_000001")
        carried = [(each.position, each.prompt.id, begun_facts(each)) for each in bench.collector._carried]
        scored, _ = bench.collector.collect(1)
        later = [each.prompt.id for each in (*bench.collector._carried, *bench.collector._running)]
        return carried, [each.group.prompt.id for each in scored] + later


def begun_facts(request: Request) -> list[Any]:
    return [(each.sample, each.finish, each.tokens.tolist(), each.versions.tolist()) for each in request.begun]


def _checkpoints(bench: Bench, folder: Path) -> Checkpoints:
    main = dist.get_rank() == 0
    collector = bench.collector
    owners = [
        Owner("sampler", bench.sampler.state_dict, bench.sampler.load_state_dict, writes=main),
        Owner("rollouts", collector.state_dict, collector.load_state_dict, writes=main, gathers=True, optional=True),
    ]
    nothing = {"save_policy": lambda folder: None, "load_policy": lambda folder: None}
    return Checkpoints(folder, owners, **nothing, keep=0, facts={})


@pytest.mark.parametrize("name", ["resume", "keep running", "withdrawn"])
def test_carried_rollouts_survive_in_any_number_of_ranks(ranks: RankPool, model: Path, tmp_path: Path, name: str):
    config = SETTINGS["resume" if name == "resume" else "keep running"]
    saved = [each for part in ranks.run(save_carried, 2, model, config, tmp_path, name == "withdrawn") for each in part]
    assert len(saved) >= 4
    assert any(begun for _, begun in saved) == (name != "keep running")
    for world in (1, 2, 3):
        results = ranks.run(load_carried, world, model, config, tmp_path)
        loaded = sorted(each for carried, _ in results for each in carried)
        assert [position for position, _, _ in loaded] == list(range(len(saved)))
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
        bench.collector._carried = whole
        state, place = bench.collector.state_dict(), bench.sampler.state_dict()
    with Bench(folder, SETTINGS["resume"], interrupted={"seed": 0}) as bench:
        bench.collector.load_state_dict(state)
        bench.sampler.load_state_dict(place)
        first, counts = bench.collector.collect(1)
        asked = list(bench.engine.asked)
        left = [each.prompt.id for each in bench.collector._carried]
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
    assert is_whole(request, 2) and not is_whole(request, 3)
    assert not is_whole(request._replace(begun=(rollout(0, "stop"), rollout(1, "abort"))), 2)
