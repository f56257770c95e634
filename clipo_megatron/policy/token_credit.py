"""Advantages of single tokens, for algorithms that have them: given on the last stage, before the update."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import ScoredTokens
from clipo_megatron.flow import Experience
from clipo_megatron.policy.parallel import Layout


def assign_token_advantages(experience: Experience, algorithm: Algorithm, layout: Layout) -> None:
    """Fill signals["advantage"] (and signals["return"]) of every scored micro-batch; collective.

    Does nothing where no stage gives tokens advantages of their own, and on stages before the last.
    """
    if not algorithm.credits_tokens or not layout.is_last_stage:
        return

    def sum_over_ranks(tensor: Tensor) -> Tensor:
        total = tensor.clone()
        if layout.dp > 1:
            dist.all_reduce(total, group=layout.dp_group)
        return total

    micro_batches = [micro for batch in experience.mini_batches for micro in batch.micro_batches]
    counts = [micro.rows.numel() for micro in micro_batches]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    names = micro_batches[0].signals
    tokens = ScoredTokens(
        rows=torch.cat([micro.rows[micro.rollout] for micro in micro_batches]),
        rollout=torch.cat([micro.rollout + start for micro, start in zip(micro_batches, starts, strict=True)]),
        old_logprobs=torch.cat([micro.old_logprobs for micro in micro_batches]),
        signals={name: torch.cat([micro.signals[name] for micro in micro_batches]) for name in names},
        sum_over_ranks=sum_over_ranks,
        reference_logprobs=_joined([micro.reference_logprobs for micro in micro_batches]),
    )
    advantage = algorithm.token_advantage(tokens, experience.table, experience.advantage)
    sizes = [micro.predict.numel() for micro in micro_batches]
    given = {"advantage": advantage} | ({} if tokens.returns is None else {"return": tokens.returns})
    for name, values in given.items():
        for micro, own in zip(micro_batches, values.split(sizes), strict=True):
            micro.signals[name] = own


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)
