"""Train-inference mismatch: how far the engine's log-probs are from the trainer's. It is measured in every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipo_megatron.algorithms.importance import LARGEST_EXPONENT, SUMS, correction_metrics, correction_sums
from clipo_megatron.config.schema import CorrectionConfig, CorrectionKind
from clipo_megatron.flow import MicroBatch, RolloutTable
from clipo_megatron.policy.batch.exchange import share_from_last_stage
from clipo_megatron.policy.parallel import Layout


def mismatch_metrics(
    micro_batches: Sequence[MicroBatch], table: RolloutTable, correction: CorrectionConfig, layout: Layout
) -> dict[str, float]:
    """Compare the engine's log-probs with the trainer's, and describe the importance weights of a correction.

    Collective. The metrics are identical on every rank:

    policy/mult_prob_error       mean of exp(|log pi_train - log pi_rollout|) over the tokens of fresh rollouts: both
                                 sides have the same weights, so anything above 1 is rounding, or a bug
    policy/rollout_kl            mean of log pi_rollout - log pi_train over the same tokens
    off_policy/mult_prob_error   as policy/mult_prob_error, over all tokens, also those of older weights
    off_policy/rollout_kl        k3 estimate of KL(rollout || train) over all tokens
    off_policy/...               what `correction_metrics` reports, if importance weights are corrected
    """
    sums = torch.zeros(5 + len(SUMS), dtype=torch.float64)
    if layout.is_last_stage:
        for micro in micro_batches:
            gap = (micro.old_logprobs - micro.rollout_logprobs).double()
            error = gap.abs().clamp(max=LARGEST_EXPONENT).exp()
            fresh = table.fresh.to(gap.device)[micro.rows][micro.rollout]
            k3 = gap.clamp(max=LARGEST_EXPONENT).exp() - 1 - gap
            parts = [error[fresh].sum(), -gap[fresh].sum(), fresh.sum().double(), error.sum(), k3.sum()]
            sums[:5] += torch.stack(parts).cpu()
            sums[5:] += correction_sums(gap, micro.rollout, correction).cpu()
    sums = share_from_last_stage(sums, layout, sum_over_dp=True)
    fresh_error, fresh_kl, fresh_count, error, kl = sums[:5].tolist()
    count = max(float(sums[-1]), 1.0)
    metrics = {"off_policy/mult_prob_error": error / count, "off_policy/rollout_kl": kl / count}
    if fresh_count:
        metrics["policy/mult_prob_error"] = fresh_error / fresh_count
        metrics["policy/rollout_kl"] = fresh_kl / fresh_count
    if correction.kind is not CorrectionKind.none:
        metrics |= correction_metrics(sums[5:])
    return metrics
