"""One update on one mini-batch, by Hugging Face name: our gradients in any layout, and a plain implementation's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from policy_steps import made_up_context, routing_of, scored_groups
from torch import Tensor
from transformers import AutoModelForCausalLM

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import Aggregation, LayoutConfig, RunConfig
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.policy.checkpoint import state
from clipo_megatron.weights.export import export

VOCAB = 263
# Old and reference log-probs, as if two other policies had been scored.
OLD_SHIFT, REFERENCE_SHIFT = 0.3, 0.5


def shift(name: str, tokens: Tensor, scale: float) -> Tensor:
    """A made-up shift of each token's log-prob, which both implementations use."""
    return scale * torch.sin(tokens.float() * {"old": 1.0, "reference": 2.0}[name])


def actor_on(config: RunConfig, layout_config: LayoutConfig) -> PolicyActor:
    config.layout = layout_config
    layout = parallel.initialize(config.layout, seed=0)
    return PolicyActor(config, layout, needs=build_algorithm(config).needs, total_steps=100)


def one_update(config: RunConfig, layout_config: LayoutConfig, shifted: bool = True) -> dict[str, Any]:
    """Gradients by Hugging Face name, the loss and the norm of one update on one mini-batch.

    With `shifted` old and reference log-probs are those of other policies.
    """
    config.algorithm.mini_batches = 1
    config.optimizer.max_grad_norm = 0.0  # clipping would scale the gradients where they lie
    actor = actor_on(config, layout_config)
    algorithm, batcher = build_algorithm(config, made_up_context(config)), actor.batcher
    everything = scored_groups(0, vocab=VOCAB, top_k=config.rollout.top_k, routing=routing_of(config))
    mine = everything[actor.layout.rank :: actor.layout.world]
    table, held = build_table(mine, step=0, observe=algorithm.observe)
    batch = batcher.mini_batches_of(held, table)[0]
    actor.score(batch.micro_batches, table, algorithm)
    if actor.layout.is_last_stage and shifted:
        for micro in batch.micro_batches:
            micro.reference_logprobs = micro.old_logprobs + shift("reference", micro.targets, REFERENCE_SHIFT)
            micro.old_logprobs = micro.old_logprobs + shift("old", micro.targets, OLD_SHIFT)
    experience = algorithm.assign_advantages(table, [batch])
    actor.batcher.assign_token_advantages(experience, algorithm)
    weighed = batcher.with_advantages(batch, experience, algorithm)
    metrics = actor.update(weighed, experience, algorithm)
    gradients = {
        bare(name): _reduced(parameter, shard) for name, parameter, shard in state._shards(actor.trainable.optimizer)
    }
    exported = export(actor.export_plan, [gradients], actor.layout.holder)
    return {
        "gradients": {name: grad.clone() for name, grad in exported},
        "metrics": metrics,
        "advantage": experience.advantage,
        "micro_batches": len(weighed.micro_batches),
    }


def bare(name: str) -> str:
    """A parameter's name without the prefix of the data-parallel wrapper."""
    return name.removeprefix("module.")


def _reduced(parameter: torch.nn.Parameter, shard: Any) -> Tensor:
    """The whole gradient of a parameter, from the shards that the ranks with copies of it have reduced."""
    return whole(parameter, shard, parameter.main_grad.view(-1)[shard.start : shard.stop])


def whole(parameter: torch.nn.Parameter, shard: Any, own: Tensor | None) -> Tensor:
    """Join the shards, some of them empty, that the ranks with copies of a parameter hold, on all of these ranks."""
    found = torch.zeros(parameter.numel())
    if own is not None:
        found[shard.start : shard.stop] = own.view(-1)
    dist.all_reduce(found, group=shard.group)
    return found.view(parameter.shape)


def force_routes(model: torch.nn.Module, routes: Tensor) -> None:
    """Let the routers of transformers' Qwen3-MoE send a sequence's tokens to `routes` [P + R - 1, L, E]."""

    def forced(gate: Any, layer: int) -> Any:
        def forward(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = torch.nn.functional.linear(states.reshape(-1, gate.hidden_dim), gate.weight)
            probs = logits.softmax(-1, dtype=torch.float)
            indices = probs.topk(gate.top_k, dim=-1).indices
            indices[: len(routes)] = routes[:, layer].long()
            weights = probs.gather(1, indices)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(logits.dtype), indices

        return forward

    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.forward = forced(layer.mlp.gate, number)


def plainly(config: RunConfig, advantage: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The same loss and its gradients with one forward per sequence, full logits and autograd."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    settings = config.algorithm
    clip_low, clip_high = settings.clip_low or 0.2, settings.clip_high or 0.2
    sequences, row = [], 0
    for scored in scored_groups(0, vocab=VOCAB, top_k=config.rollout.top_k, routing=routing_of(config)):
        for rollout, verdict in zip(scored.group.rollouts, scored.verdicts, strict=True):
            if verdict.correct is not None:
                sequences.append((scored.group.prompt.tokens, rollout, float(advantage[row])))
            row += 1
    total_tokens = sum(rollout.tokens.numel() for _, rollout, _ in sequences)
    loss = torch.zeros((), dtype=torch.float64)
    for prompt, rollout, value in sequences:
        response = rollout.tokens
        if rollout.routes is not None:
            force_routes(model, rollout.routes)
        logits = model(torch.cat([prompt, response])[None]).logits[0, prompt.numel() - 1 : -1].double()
        logits = logits / config.rollout.temperature
        if rollout.support is not None:
            for place, kept in enumerate(rollout.support.tolist()):
                cut = [token not in kept for token in range(logits.shape[1])]
                logits[place].masked_fill_(torch.tensor(cut), -1e9)
        table = logits.log_softmax(-1)
        logprobs = table.gather(1, response[:, None]).squeeze(1)
        ratio = (logprobs - logprobs.detach() - shift("old", response, OLD_SHIFT)).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        per_token = -torch.minimum(ratio * value, clipped * value)
        if settings.kl.coefficient:
            x = logprobs.detach() + shift("reference", response, REFERENCE_SHIFT) - logprobs
            per_token = per_token + settings.kl.coefficient * (x.exp() - 1 - x)
        if settings.entropy_coefficient:
            per_token = per_token + settings.entropy_coefficient * (table.exp() * table).sum(-1)
        if settings.aggregation is Aggregation.sequence_mean:
            loss = loss + per_token.mean() / len(sequences)
        else:
            loss = loss + per_token.sum() / total_tokens
    loss.backward()
    return float(loss), {name: parameter.grad for name, parameter in model.named_parameters()}
