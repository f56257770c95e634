"""Held-out accuracy: what counts as solved, and whether a gain is more than luck."""

import itertools
import json

import pytest
from small_runs import write_model

from clipo_megatron.evaluation import (
    Evaluation,
    compare,
    comparison_table,
    evaluate,
    evaluation_params,
    mcnemar_p_value,
    read_evaluations,
    remove_evaluations,
    write_evaluation,
)


def evaluation(correct, step=0):
    return Evaluation(step=step, correct=correct, truncated=0.0, ungraded=0.0, length=1.0)


def p_by_enumeration(gained, lost):
    """Share of all ways to toss a coin for each changed problem that are at least as lopsided as what was seen."""
    seen = abs(gained - lost)
    tosses = list(itertools.product((1, -1), repeat=gained + lost))
    return sum(abs(sum(toss)) >= seen for toss in tosses) / len(tosses)


@pytest.mark.parametrize("changed", range(13))
def test_mcnemar_against_all_coin_tosses(changed):
    for gained in range(changed + 1):
        p = mcnemar_p_value(gained, changed - gained)
        assert p == pytest.approx(p_by_enumeration(gained, changed - gained), rel=1e-12)
        assert p == mcnemar_p_value(changed - gained, gained)


def test_mcnemar_far_out():
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(40, 0) == pytest.approx(2.0**-39)
    assert 0.0 <= mcnemar_p_value(5000, 100) < 1e-300
    assert mcnemar_p_value(20_000, 20_000) == 1.0


def test_comparison_is_paired():
    before = evaluation({"a/0": 0.0, "a/1": 1.0, "a/2": 0.0, "b/0": 0.5, "b/1": 0.25, "gone/0": 1.0})
    after = evaluation({"a/0": 1.0, "a/1": 0.0, "a/2": 1.0, "b/0": 0.75, "b/1": 0.5, "new/0": 1.0})
    paired = compare(before, after)
    # half of the samples right is not solved; problems that one side lacks take no part, in the means neither
    assert (paired.problems, paired.gained, paired.lost) == (5, 3, 1)
    assert paired.before == pytest.approx(1.75 / 5)
    assert paired.after == pytest.approx(3.25 / 5)
    assert paired.p_value == p_by_enumeration(3, 1)
    only = compare(before, after, source="b")
    assert (only.problems, only.gained, only.lost) == (2, 1, 0)
    assert compare(before, evaluation({})).problems == 0


def test_table_has_a_row_a_source():
    before = evaluation({"x/a/0": 0.0, "x/a/1": 0.0, "b/0": 1.0})
    after = evaluation({"x/a/0": 1.0, "x/a/1": 0.0, "b/0": 1.0})
    headings, rows = comparison_table(before, after)
    assert [row[0] for row in rows] == ["b", "x/a", "all"]
    assert dict(zip(headings, rows[1], strict=True)) == {
        "source": "x/a",
        "problems": "2",
        "before": "0.0%",
        "after": "50.0%",
        "points": "+50.0",
        "gained": "1",
        "lost": "0",
        "p": "1",
    }
    assert len(comparison_table(evaluation({"b/0": 0.0}), evaluation({"b/0": 0.0}))[1]) == 1
    assert before.by_source() == {"x/a": 0.0, "b": 1.0}


def test_results_are_kept_whole_and_later_ones_dropped(tmp_path):
    results = [evaluation({"a/0": 1.0, "a/1": 0.5}, step) for step in (0, 10, 999_999, 1_000_000)]
    for result in results:
        write_evaluation(tmp_path, result)
    facts = json.loads((tmp_path / "step_000010.json").read_text())
    assert facts["accuracy"] == 0.75
    assert facts["by_source"] == {"a": 0.75}
    (tmp_path / "step_000020.tmp").write_text('{"step":')  # the writer was killed
    assert read_evaluations(tmp_path) == results
    remove_evaluations(tmp_path, after=1_000_000)
    assert read_evaluations(tmp_path) == results
    remove_evaluations(tmp_path, after=10)
    assert read_evaluations(tmp_path) == results[:2]
    assert not (tmp_path / "step_999999.json").exists()
    assert read_evaluations(tmp_path / "none") == []


def evaluate_here(answers):
    """Runs on a rank: greedy answers from an engine of fixed texts, graded for real."""
    import torch

    from clipo_megatron.config.schema import EvalConfig, RewardConfig, RolloutConfig
    from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
    from clipo_megatron.rewards.pool import GraderPool

    class Spoken:
        def generate(self, prompts, params, *, deadline_s, give_up):
            assert params.step == -1
            assert params.temperature == 0.0
            for position, prompt, _ in prompts:
                rollouts = [
                    Rollout(torch.tensor([1, 2]), torch.zeros(2), text, finish, torch.tensor([0, 0]), sample)
                    for sample, (text, finish) in enumerate(answers[prompt.id])
                ]
                yield RolloutGroup(position, prompt, rollouts)

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    prompts = [
        Prompt(name, ({"role": "user", "content": "?"},), torch.zeros(1, dtype=torch.long), "openai/gsm8k", "7")
        for name in answers
    ]
    params = evaluation_params(EvalConfig(), RolloutConfig(), (1,), seed=3)
    with GraderPool(RewardConfig(deadline_s=5.0)) as pool:
        mine = range(rank, len(prompts), world)
        return evaluate(Spoken(), pool, prompts, mine, params, step=4, deadline_s=60)


def evaluate_losing_engines(folder):
    """Runs on a rank: the same problems with an engine that stays, and with one that is lost now and then."""
    import torch
    from interrupted_engine import InterruptedEngine
    from safetensors.torch import load_file
    from small_runs import FAVOURITE

    from clipo_megatron.config.schema import EvalConfig, RewardConfig, RolloutConfig
    from clipo_megatron.flow import Prompt
    from clipo_megatron.rewards.pool import GraderPool
    from clipo_megatron.rollout.local import LocalEngine

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(3, 250, (3 + n % 9,), generator=generator) for n in range(24)]
    prompts = [Prompt(f"s/{n}", (), each, "reasoning_gym/chain_sum", FAVOURITE) for n, each in enumerate(tokens)]
    params = evaluation_params(EvalConfig(), RolloutConfig(max_new_tokens=5), (1,), seed=3)
    results, recoveries, losses = [], [], []
    with GraderPool(RewardConfig(deadline_s=60.0)) as pool:
        for loss in (0.0, 0.4):
            local = LocalEngine(folder, dtype=torch.float32, device="cpu")
            engine = InterruptedEngine(local, rank, loss=loss * (rank == 0), limit=3)
            engine.load_weights(weights.items(), version=2)

            def recover(engine=engine):
                recoveries.append(1)
                engine.load_weights(weights.items(), version=2)

            mine = range(rank, len(prompts), world)
            results.append(evaluate(engine, pool, prompts, mine, params, step=2, deadline_s=60, recover=recover))
            losses.append(engine.losses)
    return results, len(recoveries), losses


def test_an_engine_that_is_lost_changes_no_result(ranks, tmp_path):
    first, second = ranks.run(evaluate_losing_engines, 2, write_model(tmp_path / "model", layers=2))
    (undisturbed, disturbed), recoveries, losses = first
    assert undisturbed == disturbed == second[0][1]
    assert recoveries == second[1] > 0, "every rank comes to every recovery"
    assert losses == [0, recoveries] and second[2] == [0, 0]
    assert 0 < undisturbed.accuracy < 1


def test_an_ungraded_answer_is_not_solved(ranks):
    right, wrong, never = ("\\boxed{7}", "stop"), ("\\boxed{8}", "length"), ("\\boxed{9^{9^{9^{9^9}}}!!}", "stop")
    answers = {"s/0": [right, right], "s/1": [wrong, right], "s/2": [right, never], "s/3": [wrong, wrong]}
    first, second = ranks.run(evaluate_here, 2, answers)
    assert first == second
    assert first.step == 4
    assert first.ungraded == 1 / 8
    assert first.correct == {"s/0": 1.0, "s/1": 0.5, "s/2": 0.5, "s/3": 0.0}
    assert first.accuracy == 0.5
    assert first.truncated == 3 / 8
    assert first.length == 2.0
