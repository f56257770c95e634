"""A critic's gradients by Hugging Face name: ours in any layout, and those of a plain implementation."""

from __future__ import annotations

from typing import Any

import torch
from critic_weights import HEAD, by_name
from policy_steps import made_up_context, scored_groups
from torch import Tensor
from transformers import AutoModelForCausalLM
from update_steps import VOCAB, actor_on, bare, whole

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import LayoutConfig, RunConfig
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.policy.checkpoint import state
from clipo_megatron.policy.model.value_model import fresh_head

OLD_SHIFT = 0.4


def old_shift(responses: Tensor) -> Tensor:
    """A made-up difference of each token's scored value from its current one, which both implementations use."""
    return OLD_SHIFT * torch.sin(responses.float())


def one_critic_update(config: RunConfig, layout_config: LayoutConfig) -> dict[str, Any]:
    """Gradients and metrics of one update on `scored_groups(0)`, with scored values shifted by `old_shift`."""
    config.algorithm.mini_batches = 1
    config.optimizer.max_grad_norm = 0.0  # clipping would scale the gradients where they lie
    actor = actor_on(config, layout_config)
    algorithm = build_algorithm(config, made_up_context(config))
    mine = scored_groups(0, vocab=VOCAB)[actor.layout.rank :: actor.layout.world]
    table, held = build_table(mine, step=0, observe=algorithm.observe)
    batch = actor.batcher.mini_batches_of(held, table)[0]
    actor.score(batch.micro_batches, table, algorithm)
    experience = algorithm.assign_advantages(table, [batch])
    actor.batcher.assign_token_advantages(experience, algorithm)
    if actor.layout.is_last_stage:
        for micro in batch.micro_batches:
            micro.signals["value"] = micro.signals["value"] + old_shift(micro.targets)
    metrics = actor.update_critic(experience, algorithm)
    gradients = {
        bare(name): whole(parameter, shard, parameter.main_grad.view(-1)[shard.start : shard.stop])
        for name, parameter, shard in state._shards(actor.critic.trainable.optimizer)
    }
    return {
        "gradients": by_name(actor, gradients),
        "metrics": metrics,
        "own": [name for name, _ in actor.critic.stage.named_parameters()],
    }


def plain_critic(config: RunConfig, *, lam: float = 0.95, gamma: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """The value and gradients of the same loss, written token by token."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    head = fresh_head(model.config.hidden_size, config.train.seed).requires_grad_()
    clip, loss, count = config.critic.clip, torch.zeros((), dtype=torch.float64), 0
    for scored in scored_groups(0, vocab=VOCAB):
        for rollout, verdict in zip(scored.group.rollouts, scored.verdicts, strict=True):
            if verdict.correct is None:
                continue
            prompt, response = scored.group.prompt.tokens, rollout.tokens
            states = model.model(torch.cat([prompt, response])[None]).last_hidden_state[0, prompt.numel() - 1 : -1]
            values = (states @ head[0]).double()
            known = [*values.tolist(), 0.0]
            returns, gain = [0.0] * response.numel(), 0.0
            for t in reversed(range(response.numel())):
                reward = verdict.reward if t == response.numel() - 1 else 0.0
                gain = reward + gamma * known[t + 1] - known[t] + gamma * lam * gain
                returns[t] = gain + known[t]
            old = values.detach() + old_shift(response).double()
            for t in range(response.numel()):
                far = (values[t] - returns[t]) ** 2
                if clip is not None:
                    held = torch.minimum(torch.maximum(values[t], old[t] - clip), old[t] + clip)
                    far = torch.maximum(far, (held - returns[t]) ** 2)
                loss = loss + far / 2
                count += 1
    loss = loss / count
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(loss), gradients | {HEAD: head.grad}
