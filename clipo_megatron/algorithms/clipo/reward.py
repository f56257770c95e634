"""From contrastive losses to the bonus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch

if TYPE_CHECKING:
    from torch import Tensor


def contrastive_reward(
    loss: Tensor,
    valid: Tensor,
    *,
    weight: float = 0.2,
    floor: float = -0.5,
    constant: float = 0.0,
    calibrate: bool = False,
    group_sizes: Tensor | None = None,
) -> Tensor:
    """The bonus of each rollout: max(constant - weight * L, floor) where valid, else 0 (arXiv 2603.10101, section 3).

    Only correct rollouts earn it. The losses do not tell which ones they are, so pass `valid & correct` unless only
    correct rollouts were anchors.

    With `calibrate`, L is first reduced by ln(max(n_pos - 1, 1)), the value that InfoNCE, supcon_out and supcon_in take
    when all positives coincide and all negatives are far away. Without it that value alone reaches the floor from
    n_pos = 14 on (weight 0.2, floor -0.5). soft_nn is 0 there: it needs no calibration.

    Args:
        loss: [B] float, from `contrastive_loss`; no gradient flows to it.
        valid: [B] bool, the rollouts that get a bonus.
        weight: lambda.
        floor: the smallest bonus.
        constant: c.
        calibrate: whether to subtract the loss of perfect separation.
        group_sizes: [B] integer, n_pos: how many rollouts share the anchor's label in the set that its positives come
            from, the anchor included (for group and cross level its group, for batch level the batch).

    Returns:
        The bonus of each rollout, [B] in the dtype of `loss`.

    Raises:
        ValueError: `calibrate` without `group_sizes`, or shapes that differ.
        TypeError: `valid` is not bool.
    """
    if valid.dtype != torch.bool:
        raise TypeError(f"valid has dtype {valid.dtype}, needed is torch.bool: pass the mask of contrastive_loss.")
    if valid.shape != loss.shape:
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}, loss {tuple(loss.shape)}: one entry a rollout in each."
        )
    loss = loss.detach()
    if calibrate:
        if group_sizes is None:
            raise ValueError(
                "calibrate=True needs group_sizes, the number of rollouts with the anchor's label in its group, itself "
                "included: pass it, or set calibrate=False."
            )
        if group_sizes.shape != loss.shape:
            raise ValueError(
                f"group_sizes has shape {tuple(group_sizes.shape)}, loss {tuple(loss.shape)}: one entry a rollout."
            )
        loss = loss - (group_sizes - 1).clamp(min=1).to(loss.dtype).log()
    return torch.where(valid, (constant - weight * loss).clamp(min=floor), 0.0)
