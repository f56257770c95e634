"""Metrics of a step, from its rollout table and its stopwatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipo_megatron.flow import MicroBatch, RolloutTable
from clipo_megatron.telemetry.console import Stopwatch
from clipo_megatron.telemetry.metric_names import STEP_TIME, TOKENS_PER_S, phase_time


def table_metrics(table: RolloutTable, reward: Tensor, advantage: Tensor) -> dict[str, float]:
    """Metrics of rewards, verdicts and lengths over the global batch.

    reward/accuracy          share of graded rollouts that are correct
    reward/ungraded          share of finished rollouts without a verdict
    reward/mixed_groups      share of groups with both right and wrong rollouts; the others are zero-advantage groups
    rollout/windows          share of rollouts that the next step continues
    rollout/version_lag      updates between the weights of a rollout's first token and those that score it, mean
    rollout/mixed_versions   share of rollouts whose tokens come from more than one set of weights
    rollout/stale            share of rollouts with a token from weights older than those at the start of this step
    """
    graded = table.graded
    count = max(int(graded.sum()), 1)
    right = table.reward.new_zeros(len(table.prompt_ids)).index_add_(0, table.group, table.correct.float())
    wrong = torch.zeros_like(right).index_add_(0, table.group, (graded & ~table.correct).float())
    return {
        "reward/accuracy": float(table.correct.sum()) / count,
        "reward/mean": float(reward[graded].mean()) if graded.any() else 0.0,
        "reward/ungraded": 1.0 - int(graded.sum()) / max(int((~table.unfinished).sum()), 1),
        "reward/mixed_groups": float(((right > 0) & (wrong > 0)).float().mean()),
        "reward/advantage_abs": float(advantage.abs().mean()),
        "rollout/response_length": float(table.response_length.float().mean()),
        "rollout/truncated": float(table.truncated.float().mean()),
        "rollout/windows": float(table.unfinished.float().mean()),
        "rollout/version_lag": float((table.step - table.version).float().mean()),
        "rollout/mixed_versions": float(table.mixed_versions.float().mean()),
        "rollout/stale": float((~table.fresh).float().mean()),
    }


def speed_metrics(
    watch: Stopwatch, table: RolloutTable, micro_batches: Sequence[MicroBatch], *, world: int
) -> dict[str, float]:
    """Seconds of each phase, tokens per second and rank, and the share of padding in this rank's micro-batches."""
    total = watch.total()
    tokens = sum(micro.tokens.numel() for micro in micro_batches)
    trained = int((table.prompt_length + table.response_length).sum())
    generate = watch.metrics.get(phase_time("generate"), total)
    learn = watch.metrics.get(phase_time("score"), 0.0) + watch.metrics.get(phase_time("update"), 0.0)
    return {
        **watch.metrics,
        STEP_TIME: total,
        TOKENS_PER_S: trained / total / world,
        "speed/generate_tokens_per_s_per_rank": float(table.response_length.sum()) / max(generate, 1e-9) / world,
        "speed/train_tokens_per_s_per_rank": trained / max(learn, 1e-9) / world,
        "speed/padding_share": sum(micro.padding for micro in micro_batches) / max(tokens, 1),
    }
