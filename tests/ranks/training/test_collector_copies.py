"""Copies of a prompt in one step: each draws rollouts of its own, on every layout and when a run is resumed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from collector_steps import Bench, facts, merged, run_steps
from ranks import RankPool
from small_runs import write_model

from clipo_megatron.config.schema import RolloutConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


def answers_by_prompt(groups: list[Any]) -> dict[str, list[Any]]:
    """The answers of each copy of a prompt. Prompts that this model always answers alike are left out."""
    found = defaultdict(list)
    for _, prompt, tokens, _ in groups:
        found[prompt].append(tokens)
    return {name: copies for name, copies in found.items() if len({str(each) for copy in copies for each in copy}) > 1}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_copies_draw_differently_and_alike_on_every_layout(ranks: RankPool, model: Path, world: int) -> None:
    """Three problems for six places: every step holds each of them twice."""
    options = {"problems": 3}
    steps = merged(ranks.run(run_steps, world, model, RolloutConfig(), 2, options))
    for groups in steps:
        found = answers_by_prompt(groups)
        assert len(groups) == 6 and len(found) >= 2
        assert all(len(copies) == 2 and copies[0] != copies[1] for copies in found.values())
    if world > 1:
        assert steps == merged(ranks.run(run_steps, 1, model, RolloutConfig(), 2, options))


def test_the_first_copy_draws_as_if_it_were_alone(ranks: RankPool, model: Path) -> None:
    (twice,) = merged(ranks.run(run_steps, 1, model, RolloutConfig(), 1, {"problems": 3}))
    (once,) = merged(ranks.run(run_steps, 1, model, RolloutConfig(), 1, {"problems": 3, "size": 3}))
    firsts = {prompt: copies[0] for prompt, copies in answers_by_prompt(twice).items()}
    assert firsts == {prompt: copies[0] for prompt, copies in answers_by_prompt(once).items()}


@pytest.mark.parametrize("world", [1, 2])
def test_rounds_of_dynamic_sampling_do_not_repeat_themselves(ranks: RankPool, model: Path, world: int) -> None:
    """Few problems are asked again in the later rounds of a step; a repetition would be as useless as before."""
    config = RolloutConfig(max_refill_rounds=6)
    results = ranks.run(run_steps, world, model, config, 1, {"problems": 2, "size": 6})
    assert results[0]["metrics"][0]["refilled_groups"] > 0
    (groups,) = merged(results)
    for copies in answers_by_prompt(groups).values():
        assert len({str(tokens) for tokens in copies}) == len(copies)


def windowed_steps(folder: Path, resume_after: int | None) -> list[Any]:
    """Steps whose rollouts grow by two tokens each, with two problems for four places; interrupted after a step."""
    config = RolloutConfig(window_tokens=2)
    options = {"problems": 2, "size": 4}
    with Bench(folder, config, **options) as bench:
        batches = []
        for step in range(4):
            if step == resume_after:
                rest, place = bench.collector.state_dict(), bench.sampler.state_dict()
                bench = Bench(folder, config, **options)
                bench.sampler.load_state_dict(place)
                bench.collector.load_state_dict(rest)
            scored, _ = bench.collector.collect(step)
            batches.append([group[1:] for group in facts(scored)])
        return batches


def test_carried_copies_stay_apart_and_resume_to_the_bit(ranks: RankPool, model: Path) -> None:
    (whole,) = ranks.run(windowed_steps, 1, model, None)
    for after in (1, 2, 3):
        assert ranks.run(windowed_steps, 1, model, after) == [whole]
    varied = [[str(group) for group in groups if group[0] != "p/0"] for groups in whole]
    assert max(map(len, varied)) > 2 and all(len(set(groups)) == len(groups) for groups in varied)


def mixed_groups(folder: Path, rounds: int) -> list[Any]:
    with Bench(folder, RolloutConfig(max_refill_rounds=rounds), problems=40) as bench:
        scored, metrics = bench.collector.collect(0)
        mixed = [{True, False} <= {verdict.correct for verdict in each.verdicts} for each in scored]
        return [metrics["rollout/mixed_groups"], sum(mixed), len(mixed)]


@pytest.mark.parametrize("world", [1, 2])
def test_mixed_groups_is_a_share_without_dynamic_sampling_too(ranks: RankPool, model: Path, world: int) -> None:
    results = ranks.run(mixed_groups, world, model, 0)
    share = sum(mixed for _, mixed, _ in results) / sum(count for _, _, count in results)
    assert [each[0] for each in results] == [share] * world
    assert 0 < share < 1, "a task with something to tell apart"
