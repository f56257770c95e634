"""Drift between an engine and the trainer in bf16, with the engine's experts and with the trainer's own.

SGLang (0.5.23) names experts on GPUs only: on a CPU it ends where it allocates page-locked memory for them. Here
transformers stands for it, which rounds in other places than Megatron does.
"""

from __future__ import annotations

import torch
from policy_steps import configuration, routing_of, scored_groups
from ranks import RankPool
from tiny_models import tiny_qwen3_moe
from transformers import AutoModelForCausalLM

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import DType, LayoutConfig, RunConfig
from clipo_megatron.flow import ScoredGroup
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table

VOCAB = 263


def engine_groups(config: RunConfig) -> list[ScoredGroup]:
    """Made-up rollouts with the log-probs and the experts of transformers in bf16."""
    routing = routing_of(config)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.bfloat16).eval()
    groups = scored_groups(0, vocab=VOCAB, groups=12)
    for scored in groups:
        for rollout in scored.group.rollouts:
            tokens = torch.cat([scored.group.prompt.tokens, rollout.tokens])
            with torch.no_grad():
                output = model(tokens[None], output_router_logits=True)
            table = output.logits[0, :-1].float().log_softmax(-1)[-rollout.tokens.numel() :]
            rollout.logprobs = table.gather(1, rollout.tokens[:, None])[:, 0]
            chosen = [each.float().softmax(-1).topk(routing.per_token, dim=-1).indices for each in output.router_logits]
            rollout.routes = torch.stack(chosen, 1)[:-1].to(torch.int16)
    return groups


def drift(config: RunConfig, groups: list[ScoredGroup]) -> float:
    config.layout = LayoutConfig(share_prompts=False)
    layout = parallel.initialize(config.layout, seed=0)
    algorithm = build_algorithm(config)
    actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=10)
    table, samples = build_table(groups, step=0)
    micros = [micro for batch in actor.batcher.mini_batches_of(samples, table) for micro in batch.micro_batches]
    return actor.score(micros, table, algorithm)["policy/mult_prob_error"]


def test_the_trainer_is_nearer_to_the_engine_with_its_experts(ranks: RankPool, tmp_path) -> None:
    config = configuration(tiny_qwen3_moe(tmp_path, vocab=VOCAB))
    config.model.replay_routing, config.model.dtype = True, DType.bf16
    groups = engine_groups(config)
    (replayed,) = ranks.run(drift, 1, config, groups)
    for scored in groups:
        for rollout in scored.group.rollouts:
            rollout.routes = None
    (own,) = ranks.run(drift, 1, config, groups)
    print("mult_prob_error with the engine's experts", replayed, "with its own", own)
    assert replayed - 1 < own - 1 < 0.2
