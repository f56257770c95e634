"""Rollouts that no engine has sampled, to measure what a policy does with rollouts of some lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.flow import RolloutTable, Sample


def random_rollouts(
    vocabulary: int, *, groups: int, samples: int, prompt: int, response: int, seed: int = 0
) -> tuple[RolloutTable, list[Sample]]:
    """Rollouts of random tokens and about the given lengths, of which every other one is correct."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(mean: int) -> Tensor:
        count = int(torch.randint(max(1, mean // 2), mean + mean // 2 + 1, (), generator=generator))
        return torch.randint(0, vocabulary, (count,), generator=generator)

    made: list[Sample] = []
    for group in range(groups):
        asked = tokens(prompt)
        for _ in range(samples):
            answer = tokens(response)
            made.append(Sample(len(made), group, asked, answer, torch.full((answer.numel(),), -5.0)))
    correct = torch.arange(len(made)) % 2 == 0
    table = RolloutTable(
        prompt_ids=[f"random/{group}" for group in range(groups)],
        group=torch.tensor([each.group for each in made]),
        correct=correct,
        graded=torch.ones_like(correct),
        reward=correct.float(),
        prompt_length=torch.tensor([each.prompt.numel() for each in made]),
        response_length=torch.tensor([each.response.numel() for each in made]),
        truncated=torch.zeros_like(correct),
        version=torch.zeros(len(made), dtype=torch.int64),
    )
    return table, made
