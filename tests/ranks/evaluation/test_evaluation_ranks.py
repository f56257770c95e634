"""Evaluations on several ranks: every rank gets the result, and a lost engine does not change it."""

from small_runs import write_model

from clipo_megatron.evaluation.evaluate import evaluate, evaluation_params


def evaluate_here(answers):
    """Runs on a rank: greedy answers from an engine of fixed texts, graded for real."""
    import torch

    from clipo_megatron.config.schema import EvalConfig, GraderMode, RewardConfig, RolloutConfig
    from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
    from clipo_megatron.rewards.pool import GraderPool
    from clipo_megatron.rollout.source import RolloutSource

    class Spoken:
        def generate(self, prompts, params, *, deadline_s, should_cancel):
            assert params.step == -1
            assert params.temperature == 0.0
            for position, prompt, _ in prompts:
                rollouts = [
                    Rollout(torch.tensor([1, 2]), torch.zeros(2), text, finish, torch.tensor([0, 0]), sample)
                    for sample, (text, finish) in enumerate(answers[prompt.id])
                ]
                yield RolloutGroup(position, prompt, rollouts)

    world = torch.distributed.get_world_size()
    prompts = [
        Prompt(name, ({"role": "user", "content": "?"},), torch.zeros(1, dtype=torch.long), "openai/gsm8k", "7.5")
        for name in answers
    ]
    params = evaluation_params(EvalConfig(), RolloutConfig(), (1,), seed=3)
    with GraderPool(RewardConfig(mode=GraderMode.reference, deadline_s=2.0)) as pool:
        source = RolloutSource(Spoken(), range(world), lambda: None)
        return evaluate(source, pool, prompts, params, step=4, deadline_s=60)


def evaluate_losing_engines(folder):
    """Runs on a rank: the same problems with an engine that stays, and with one that is lost now and then."""
    import torch
    from interrupted_engine import InterruptedEngine
    from safetensors.torch import load_file
    from small_runs import FAVOURITE

    from clipo_megatron.config.schema import EvalConfig, RewardConfig, RolloutConfig
    from clipo_megatron.flow import Prompt
    from clipo_megatron.rewards.pool import GraderPool
    from clipo_megatron.rollout.local.engine import LocalEngine
    from clipo_megatron.rollout.source import RolloutSource

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

            def resync(engine=engine):
                recoveries.append(1)
                engine.load_weights(weights.items(), version=2)

            source = RolloutSource(engine, range(world), resync)
            results.append(evaluate(source, pool, prompts, params, step=2, deadline_s=60))
            losses.append(engine.losses)
    return results, len(recoveries), losses


def test_an_engine_that_is_lost_changes_no_result(ranks, tmp_path):
    first, second = ranks.run(evaluate_losing_engines, 2, write_model(tmp_path / "model", layers=2))
    (undisturbed, disturbed), recoveries, losses = first
    assert undisturbed == disturbed == second[0][1]
    assert recoveries == second[1] > 0, "every rank comes to every recovery"
    assert losses == [0, recoveries] and second[2] == [0, 0]
    assert 0 < undisturbed.accuracy < 1


def test_an_ungraded_response_counts_as_wrong(ranks):
    right, wrong = ("\\boxed{7.5}", "stop"), ("\\boxed{8.5}", "length")
    never = ("\\boxed{9999999**99999999}", "stop")  # SymPy, which mode `reference` asks, does not return
    answers = {"s/0": [right, right], "s/1": [wrong, right], "s/2": [right, never], "s/3": [wrong, wrong]}
    first, second = ranks.run(evaluate_here, 2, answers)
    assert first == second
    assert first.step == 4
    assert first.ungraded == 1 / 8
    assert first.correct == {"s/0": 1.0, "s/1": 0.5, "s/2": 0.5, "s/3": 0.0}
    assert first.accuracy == 0.5
    assert first.truncated == 3 / 8
    assert first.length == 2.0
    assert [each.votes for each in first.problems.values()] == [(), (1,), (1,), (2,)]
    assert first.problems["s/2"].ungraded == 1 and first.problems["s/3"].tokens == 4
    assert len({each.digest for each in first.problems.values()}) == 1  # the same question, asked four times
