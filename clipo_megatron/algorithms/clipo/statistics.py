"""Metrics of the contrastive head and its bonus, in O(B * d)."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.clipo.head import normalise


def statistics(
    correct: Tensor,
    group: Tensor,
    loss: Tensor,
    valid: Tensor,
    bonus: Tensor,
    *,
    floor: float | None = -0.5,
    embeddings: Tensor | None = None,
) -> dict[str, float]:
    """Metrics of one step over the whole batch; one without anything to average over (no valid anchor, no pair) is left
    out.

        clipo/loss                       mean loss of the valid anchors
        clipo/groups_with_valid_anchor   share of groups
        clipo/bonus_mean                 mean bonus of the valid correct rollouts
        clipo/bonus_at_floor             share of these whose bonus is the floor
        clipo/bonus_spread               unbiased std of their bonus within a group, mean over groups with two or more
        clipo/positive_cosine            mean over pairs of correct rollouts of one group
        clipo/negative_cosine            mean over pairs of a correct and a wrong rollout of one group

    Args:
        correct: [B] bool.
        group: [B] integer ids.
        loss: [B] float, from `contrastive_loss`.
        valid: [B] bool, from `contrastive_loss`.
        bonus: [B] float.
        floor: the smallest bonus; None where there is none, and no share of it.
        embeddings: [B, d], for the cosines; None leaves them out.

    Returns:
        The values by metric name.
    """
    names = ("correct", "group", "loss", "valid", "bonus")
    for name, column in zip(names, (correct, group, loss, valid, bonus), strict=True):
        if column.shape != group.shape:
            raise ValueError(
                f"{name} has shape {tuple(column.shape)}, group {tuple(group.shape)}: one a rollout in each."
            )
    with torch.no_grad():
        ids, group = torch.unique(group, return_inverse=True)
        groups = len(ids)
        metrics: dict[str, float] = {}
        if groups:
            anchored = torch.bincount(group[valid], minlength=groups) > 0
            metrics["clipo/groups_with_valid_anchor"] = anchored.double().mean().item()
        if valid.any():
            metrics["clipo/loss"] = loss[valid].double().mean().item()
        paid = valid & correct
        if paid.any():
            values = bonus[paid].double()
            metrics["clipo/bonus_mean"] = values.mean().item()
            if floor is not None:
                metrics["clipo/bonus_at_floor"] = (bonus[paid] <= floor).double().mean().item()
            spread = _spread(values, group[paid], groups)
            if spread.numel():
                metrics["clipo/bonus_spread"] = spread.mean().item()
        if embeddings is not None and groups:
            metrics |= _cosines(embeddings, correct, group, groups)
    return metrics


def _spread(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """The unbiased standard deviation of the values of each group with two or more."""
    count = torch.bincount(group, minlength=groups)
    mean = _sum_by(values, group, groups) / count.clamp(min=1)
    square = _sum_by((values - mean[group]) ** 2, group, groups)
    several = count > 1
    return (square[several] / (count[several] - 1)).sqrt()


def _cosines(embeddings: Tensor, correct: Tensor, group: Tensor, groups: int) -> dict[str, float]:
    # Sums over pairs from sums over rows, sum_{i != j} z_i.z_j = |sum z|^2 - sum |z|^2; float64 against cancellation.
    z = normalise(embeddings.double())
    right = _sum_by(z * correct[:, None], group, groups)
    wrong = _sum_by(z * ~correct[:, None], group, groups)
    n_right = torch.bincount(group[correct], minlength=groups)
    n_wrong = torch.bincount(group[~correct], minlength=groups)
    found = {}
    if positive_pairs := int((n_right * (n_right - 1)).sum()):
        found["clipo/positive_cosine"] = ((right.square().sum() - z[correct].square().sum()) / positive_pairs).item()
    if negative_pairs := int((n_right * n_wrong).sum()):
        found["clipo/negative_cosine"] = ((right * wrong).sum() / negative_pairs).item()
    return found


def _sum_by(values: Tensor, group: Tensor, groups: int) -> Tensor:
    return values.new_zeros(groups, *values.shape[1:]).index_add(0, group, values)
