"""Tables of rollouts for tests of methods without ranks: groups that are all right, all wrong, mixed, or of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipo_megatron.algorithms.hook import Hook, TokenBatch
from clipo_megatron.flow import Experience, RolloutTable

# Verdicts by group; None: ungraded.
CASES: dict[str, list[list[bool | None]]] = {
    "random": [[True, False, True, False, None], [False, True, False], [True, True, False, True, False, False]],
    "all right": [[True, True, True], [True, True]],
    "all wrong": [[False, False], [False, False, False]],
    "one right": [[False, True, False, False], [False, False, True]],
    "groups of one": [[True], [False], [None]],
    "everything": [[True, True], [False], [False, True, None, True], [False, False, None], [None, None], [True]],
}


def table_of(verdicts: list[list[bool | None]], seed: int = 0) -> tuple[RolloutTable, Tensor]:
    """A step with these verdicts and random lengths; and shaped rewards [B] float32, unequal within a group."""
    generator = torch.Generator().manual_seed(seed)
    flat = [verdict for group in verdicts for verdict in group]
    correct = torch.tensor([verdict is True for verdict in flat])
    lengths = torch.randint(1, 9, (len(flat),), generator=generator)
    table = RolloutTable(
        prompt_ids=[f"made up/{number}" for number in range(len(verdicts))],
        group=torch.tensor([number for number, group in enumerate(verdicts) for _ in group]),
        correct=correct,
        graded=torch.tensor([verdict is not None for verdict in flat]),
        reward=correct.float(),
        prompt_length=torch.full((len(flat),), 3),
        response_length=lengths,
        truncated=torch.zeros(len(flat), dtype=torch.bool),
        version=torch.zeros(len(flat), dtype=torch.int64),
    )
    share = 1 - 0.2 * torch.rand(len(flat), generator=generator)
    return table, share * correct


def with_options(method: type[Hook], *settings: Any, **options: Any) -> Any:
    """A method of these options; a base method gets its settings first."""
    return method(*settings, method.options_class(**options))


def experience_of(table: RolloutTable, reward: Tensor, advantage: Tensor | None = None) -> Experience:
    """The experience in which all graded rollouts train."""
    return Experience(table, [], reward, torch.zeros_like(reward) if advantage is None else advantage, table.graded)


def tokens_of(table: RolloutTable, seed: int = 0) -> TokenBatch:
    """Every token of the table in one micro-batch, random float64 log-probs; gradients flow through `logprobs`."""
    generator = torch.Generator().manual_seed(seed)
    rollout = torch.repeat_interleave(torch.arange(table.size), table.response_length)

    def logprobs() -> Tensor:
        return -2 * torch.rand(rollout.numel(), generator=generator, dtype=torch.float64)

    old = logprobs()
    return TokenBatch(
        logprobs=(old + 0.1 * logprobs() + 0.1).requires_grad_(),
        old_logprobs=old,
        advantages=torch.zeros(rollout.numel()),
        weights=torch.ones(rollout.numel()),
        rollout=rollout,
        rollout_logprobs=old,
        rows=rollout,
        reference_logprobs=old + 0.2 * logprobs() + 0.2,
    )
