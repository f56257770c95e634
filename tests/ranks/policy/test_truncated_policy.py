"""Rollouts that are drawn by top-p and top-k: the trainer's and the engine's log-probs are those of the same policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from local_engines import bare_prompts
from policy_steps import configuration
from ranks import RankPool
from tiny_models import tiny_llama, tiny_weights
from transformers import AutoModelForCausalLM

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.importance import importance_weights
from clipo_megatron.config.schema import CorrectionLevel, LayoutConfig, RunConfig
from clipo_megatron.flow import Rollout, RolloutGroup, ScoredGroup, Verdict
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.rollout.engine import SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine

TEMPERATURE, FAR = 0.3, 0.05


def engine_weights(folder: Path, far: float) -> dict[str, torch.Tensor]:
    """The folder's weights, moved by `far` of themselves."""
    mine, other = (tiny_weights(folder, seed=seed) for seed in (0, 1))
    return {name: mine[name] + far * other[name] for name in mine}


def drawn(folder: Path, weights: dict[str, torch.Tensor], truncation: dict[str, Any]) -> list[RolloutGroup]:
    engine = LocalEngine(folder, dtype=torch.float32, device="cpu")
    engine.load_weights(weights.items(), version=0)
    params = SamplingParams(samples=4, max_new_tokens=12, temperature=TEMPERATURE, **truncation)
    return sorted(engine.generate(bare_prompts([5, 9, 7]), params, deadline_s=300), key=lambda group: group.position)


def scored(config: RunConfig, layout_config: LayoutConfig, groups: list[RolloutGroup]) -> dict[str, Any]:
    """On a rank: the metrics of a scoring, and on the last stage old log-probs by (prompt, sample)."""
    config.layout = layout_config
    layout = parallel.initialize(config.layout, seed=0)
    algorithm = build_algorithm(config)
    actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=10)
    verdicts = [Verdict(sample % 2 == 0, float(sample % 2 == 0)) for sample in range(4)]
    mine = [ScoredGroup(group, verdicts) for group in groups[layout.rank :: layout.world]]
    table, samples = build_table(mine, step=0)
    micros = [micro for batch in actor.batcher.mini_batches_of(samples, table) for micro in batch.micro_batches]
    metrics = actor.score(micros, table, algorithm)
    found = {}
    for micro in micros if layout.is_last_stage else ():
        for index, row in enumerate(micro.rows.tolist()):
            found[divmod(row, 4)] = micro.old_logprobs[micro.rollout == index]
    return {"metrics": metrics, "old_logprobs": found}


def among(model: Any, prompt: torch.Tensor, rollout: Rollout) -> list[float]:
    """Log-probs of a rollout's tokens within their supports, token by token in float64."""
    with torch.no_grad():
        logits = model(torch.cat((prompt, rollout.tokens))[None]).logits[0, prompt.numel() - 1 : -1]
    found = []
    for token, kept, row in zip(rollout.tokens.tolist(), rollout.support.tolist(), logits.tolist(), strict=True):
        odds = {each: math.exp(row[each] / TEMPERATURE) for each in kept if each >= 0}
        found.append(math.log(odds[token] / sum(odds.values())))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), tied=False)


@pytest.mark.parametrize(
    "truncation", [{"top_p": 0.9, "top_k": 64}, {"top_k": 20}, {"top_p": 0.9, "top_k": 20}], ids=str
)
def test_ratios_are_those_of_the_truncated_policy(truncation, folder: Path, ranks: RankPool) -> None:
    weights = engine_weights(folder, FAR)
    groups = drawn(folder, weights, truncation)
    widths = torch.cat([(each.support >= 0).sum(-1) for group in groups for each in group.rollouts])
    assert widths.min() >= 1 and 1 < widths.float().mean() <= widths.max() <= truncation["top_k"]
    trainer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    engine = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    engine.load_state_dict({name: each.double() for name, each in weights.items()})
    exact = {
        (group.position, rollout.sample): [among(model, group.prompt.tokens, rollout) for model in (trainer, engine)]
        for group in groups
        for rollout in group.rollouts
    }
    config = configuration(folder)
    config.rollout.temperature = TEMPERATURE
    for layout in (LayoutConfig(), LayoutConfig(tp=2), LayoutConfig(cp=2)):
        world = layout.tp * layout.cp
        found = ranks.run(scored, world, config, layout, groups)[0]["old_logprobs"]
        assert found.keys() == exact.keys()
        ratios = []
        for group in groups:
            for rollout in group.rollouts:
                ours, (old, behaviour) = found[group.position, rollout.sample], exact[group.position, rollout.sample]
                torch.testing.assert_close(ours, torch.tensor(old), rtol=0, atol=1e-4)
                torch.testing.assert_close(rollout.logprobs, torch.tensor(behaviour), rtol=0, atol=1e-4)
                tokens = torch.arange(ours.numel())
                ratio = importance_weights(ours - rollout.logprobs, tokens, CorrectionLevel.token)
                expected = (torch.tensor(old) - torch.tensor(behaviour)).double().exp()
                torch.testing.assert_close(ratio, expected, rtol=2e-4, atol=0)
                ratios.append(expected)
        spread = torch.cat(ratios)
        assert spread.min() < 0.9 and spread.max() > 1.1, "the two policies differ"


def test_engine_and_trainer_agree_under_the_same_weights(folder: Path, ranks: RankPool) -> None:
    groups = drawn(folder, engine_weights(folder, 0.0), {"top_p": 0.9, "top_k": 64})
    config = configuration(folder)
    config.rollout.temperature = TEMPERATURE
    (found,) = ranks.run(scored, 1, config, LayoutConfig(), groups)
    assert abs(found["metrics"]["policy/mult_prob_error"] - 1) < 1e-4
    for group in groups:
        for rollout in group.rollouts:
            rollout.support = None  # as if what was drawn from were not known
    (found,) = ranks.run(scored, 1, config, LayoutConfig(), groups)
    assert found["metrics"]["policy/mult_prob_error"] > 1.05
