"""The loss of any method as one graph over all rollouts of an unpacked transformers model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from policy_steps import made_up_context, scored_groups
from torch import Tensor
from transformers import AutoModelForCausalLM
from update_steps import VOCAB, actor_on

from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import ScoredTokens, TokenBatch
from clipo_megatron.config.schema import LayoutConfig, RunConfig
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.policy.model.value_model import fresh_head


def by_autograd(config: RunConfig) -> dict[str, Tensor]:
    """Gradients by Hugging Face name of the step's loss over `scored_groups(0)`; a function for one rank.

    Forwards go one sequence at a time, old log-probs are the first ones, group losses are differentiated directly.
    """
    actor_on(config, LayoutConfig())  # for its process groups only
    algorithm = build_algorithm(config, made_up_context(config))
    groups = scored_groups(0, vocab=VOCAB)
    table, samples = build_table(groups, step=0, observe=algorithm.observe)
    samples = sorted(samples, key=lambda sample: sample.row)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)

    def logprobs(prompts: dict[int, Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        found, entropies = [], []
        for sample in samples:
            prompt = (prompts or {}).get(sample.group, sample.prompt)
            logits = model(torch.cat([prompt, sample.response])[None]).logits[0, prompt.numel() - 1 : -1]
            shares = (logits / (config.rollout.temperature or 1.0)).log_softmax(-1)
            found.append(shares.gather(1, sample.response[:, None]).squeeze(1))
            entropies.append(-(shares.exp() * shares).sum(-1))
        return found, entropies

    lengths = table.response_length
    rollout = torch.repeat_interleave(torch.arange(table.size), lengths)
    lp, entropy = (torch.cat(each) for each in logprobs())
    old = lp.detach()
    per_rollout = torch.zeros(table.size, dtype=torch.float64).index_add(0, rollout, old.double())
    signals: dict[str, Any] = {"entropy": entropy.detach()}
    table.signals |= {"logprob_sum": per_rollout, "kl": torch.zeros(table.size)}
    if "pooled_states" in algorithm.needs:
        table.signals["pooled_states"] = pooled(model, samples)
    if "values" in algorithm.needs:
        signals |= values_by(model, samples, config)
    with torch.no_grad():
        for name, prompts in algorithm.variants(table).items():
            if prompts:
                signals[name] = torch.cat(logprobs(prompts)[0])
    experience = algorithm.assign_advantages(table, [])
    advantages = experience.advantage[rollout]
    if algorithm.assigns_token_advantages:
        tokens = ScoredTokens(rollout, rollout, old, signals, sum_over_ranks=torch.clone)
        advantages = algorithm.token_advantage(tokens, table, experience.advantage)
    rows = experience.keep.nonzero().squeeze(1)
    weight = algorithm.token_weight(table, rows)
    batch = TokenBatch(
        logprobs=lp,
        old_logprobs=old,
        advantages=advantages,
        weights=weight[rollout],
        rollout=rollout,
        rollout_logprobs=torch.cat([sample.logprobs for sample in samples]),
        rows=rollout,
        reference_logprobs=old,
        entropy=entropy,
        signals=signals,
    )
    loss = (batch.weights * algorithm.loss(replace(batch))).sum()
    if algorithm.has_group_loss:
        per_token = algorithm.scores(batch).double()
        scores = torch.zeros(table.size, per_token.shape[1], dtype=torch.float64).index_add(0, rollout, per_token)
        loss = loss + algorithm.base_method.group_loss(scores[rows], experience, rows)
    prompts = set(table.group[rows].tolist())
    for shown in (each for group, each in experience.demonstrations.items() if group in prompts):
        logits = model(torch.cat([shown.prompt, shown.response])[None]).logits[0, shown.prompt.numel() - 1 : -1]
        shares = (logits / (config.rollout.temperature or 1.0)).log_softmax(-1)
        loss = loss - shown.weight / len(prompts) * shares.gather(1, shown.response[:, None]).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def pooled(model: Any, samples: Any) -> Tensor:
    """Mean state after the final norm over the response's tokens, [B, H]."""
    states = []
    for sample in samples:
        ids = torch.cat([sample.prompt, sample.response])[None]
        with torch.no_grad():
            states.append(model.model(ids).last_hidden_state[0, sample.prompt.numel() :].mean(0))
    return torch.stack(states)


def values_by(model: Any, samples: Any, config: RunConfig) -> dict[str, Tensor]:
    """Signals of a critic that has the policy's weights and a fresh head: values before and with each token, [N]."""
    head = fresh_head(model.config.hidden_size, config.train.seed)[0]
    before, after = [], []
    for sample in samples:
        ids = torch.cat([sample.prompt, sample.response])[None]
        with torch.no_grad():
            values = model.model(ids).last_hidden_state[0] @ head
        before.append(values[sample.prompt.numel() - 1 : -1])
        after.append(values[sample.prompt.numel() :])
    return {"value": torch.cat(before), "next_value": torch.cat(after)}
