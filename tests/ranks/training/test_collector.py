"""The collector: which prompts are requested, and which groups train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from collector_steps import COUNTS, Bench, facts, merged, prompts, run_steps
from ranks import RankPool
from small_runs import write_model

from clipo_megatron.config.schema import RolloutConfig
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.flow import RolloutGroup, ScoredGroup, Verdict
from clipo_megatron.rollout.engine import Request
from clipo_megatron.training.group_buffer import has_reward_variance
from clipo_megatron.training.prompt_assignment import assign_in_turn, oversampled, select_groups, share
from clipo_megatron.training.step_counters import StepCounters


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


# ---------------------------------------------------------------- one page of rules


def test_prompts_are_assigned_in_turn():
    assert assign_in_turn([2, 1, 3]) == [0, 1, 2, 0, 2, 2]
    assert assign_in_turn([]) == assign_in_turn([0, -2]) == []
    for world, count in [(1, 5), (3, 7), (4, 3)]:
        room = [share(count, range(world), rank) for rank in range(world)]
        assert assign_in_turn(room) == [index % world for index in range(count)]
    assert share(5, [0, 2], 1) == 0
    assert [share(5, [0, 2], rank) for rank in (0, 2)] == [3, 2]


def test_over_sampling_requests_whole_prompts():
    assert [oversampled(10, factor) for factor in (1.0, 1.1, 1.11, 1.5, 2.0)] == [10, 11, 12, 15, 20]
    assert [oversampled(quota, 1.5) for quota in (0, 1, 2, 3)] == [0, 2, 3, 5]


def test_groups_with_reward_variance_come_first():
    groups = {7: (0, False), 2: (1, True), 5: (0, False), 9: (1, True), 3: (0, True)}
    assert select_groups(groups, 2) == ({2: 0, 3: 1}, [9])
    assert select_groups(groups, 3) == ({2: 0, 3: 1, 9: 2}, [])
    assert select_groups(groups, 4) == ({2: 0, 3: 1, 5: 2, 9: 3}, [])


def test_no_round_starts_that_would_miss_the_deadline():
    assert StepCounters().has_time(0.0), "the first round always begins"
    assert StepCounters(elapsed_s=[4.0]).has_time(8.1) and not StepCounters(elapsed_s=[4.0]).has_time(8.0)
    assert StepCounters(elapsed_s=[1.0, 4.0, 5.0]).has_time(8.1) and not StepCounters(
        elapsed_s=[1.0, 4.0, 5.0]
    ).has_time(7.9)


def test_a_group_with_right_and_wrong_answers_has_reward_variance():
    def scored(*correct: bool | None) -> ScoredGroup:
        return ScoredGroup(RolloutGroup(0, prompts(1)[0], []), [Verdict(each, 0.0) for each in correct])

    assert has_reward_variance(scored(True, False, None))
    assert not any(
        has_reward_variance(scored(*each)) for each in [(True, True), (False, None), (True, None), (None, None), ()]
    )


# ---------------------------------------------------------------- a local engine


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_plain_step_requests_the_prompts_that_the_sampler_draws(ranks: RankPool, model: Path, world: int):
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
                group = next(bench.engine.generate([request], params, deadline_s=60))
                scored = bench.graders.grade(group).result()
                verdicts = {verdict.correct for verdict in scored.verdicts}
                found.append((facts([scored])[0], verdicts == {True, False}))
            if all(mixed for _, mixed in found):
                break
    kept = [group for group, mixed in found if mixed][:size]
    kept += [group for group, mixed in found if not mixed][: size - len(kept)]
    return [sorted(kept), len(found)]


@pytest.mark.parametrize("rounds", [1, 6])
def test_zero_advantage_groups_are_replaced(ranks: RankPool, model: Path, rounds: int):
    (expected, asked), *_ = ranks.run(dynamic_sampling_by_hand, 1, model, 6, rounds)
    mixed = sum(len(set(group[3])) == 2 for group in expected)
    assert (mixed < 6) == (rounds == 1), "the cap and the way to a full batch are both to be seen"
    config = RolloutConfig(max_refill_rounds=rounds)
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
