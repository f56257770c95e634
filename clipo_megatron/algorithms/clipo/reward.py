"""From contrastive losses, or from scores, to the bonus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch

if TYPE_CHECKING:
    from torch import Tensor

    from clipo_megatron.flow import RolloutTable


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


# Added to the deviation of the scores, in nats: where correct rollouts differ by less, for instance by the rounding of
# similarities under a collapsed head, the bonus fades to 0 and is not that noise at full size.
DEVIATION_EPSILON = 1e-3
LIMIT = 2.0  # deviations from the mean that count


def standardised_reward(score: Tensor, paid: Tensor, among: Tensor, *, weight: float = 0.2) -> Tensor:
    """The bonus weight * clip((g - mean g) / (deviation of g + 1e-3), -2, 2), less its mean; 0 where none is paid.

    Mean and unbiased standard deviation are over the rollouts paid that are compared with one another, so that the
    bonus sums to 0 over these, and its size is below 2.5 * weight. Two rollouts are always 0.7 of their own deviation
    from their mean, which says nothing: theirs is the deviation of the batch, the root of the pooled variance.

    Args:
        score: [B] float, g, the higher the better.
        paid: [B] bool, the rollouts that get a bonus.
        among: [B] integer, equal for rollouts that are compared with one another: the group, or one value for all.
        weight: beta, the bonus of one deviation.

    Returns:
        [B] in the dtype of `score`.
    """
    index = torch.unique(among, return_inverse=True)[1][paid]
    size = int(index.max()) + 1 if index.numel() else 0
    count = torch.bincount(index, minlength=size)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(size).index_add(0, index, values)

    def centred(values: Tensor) -> Tensor:
        return values - (total(values) / count.clamp(min=1))[index]

    gaps = centred(score[paid].detach().double())
    squares = total(gaps.square())
    own = (squares / (count - 1).clamp(min=1)).sqrt()
    batch = (squares.sum() / (count - 1).clamp(min=0).sum().clamp(min=1)).sqrt()
    deviation = torch.where(count > 2, own, batch)
    steps = centred((gaps / (deviation[index] + DEVIATION_EPSILON)).clamp(-LIMIT, LIMIT))
    bonus = torch.zeros_like(score)
    bonus[paid] = (weight * steps).to(score.dtype)
    return bonus


def comparable(table: RolloutTable) -> Tensor:
    """The rollouts that get a bonus at group level, [B] bool: correct, with another correct and a wrong one in the
    group."""
    groups = len(table.prompt_ids)
    right = torch.bincount(table.group[table.correct], minlength=groups)[table.group]
    wrong = torch.bincount(table.group[table.graded & ~table.correct], minlength=groups)[table.group]
    return table.correct & (right > 1) & (wrong > 0)


def has_scores(form: str, loss: str) -> bool:
    """Whether a bonus is made of `contrastive_scores`; else it is made of the losses."""
    return form == "ratio" or (form == "expected" and loss in ("infonce", "supcon_out"))


def compared(correct: Tensor, group: Tensor, level: str, loss: str) -> Tensor:
    """How many correct rollouts there are where each rollout's positives come from, its group or the batch.

    [B] int64; 1 for soft_nn, from whose loss calibration subtracts nothing: at perfect separation it is 0, not
    ln(n_pos - 1).
    """
    if loss == "soft_nn":
        return torch.ones_like(group)
    if level == "batch":
        return correct.sum().expand_as(group)
    index = torch.unique(group, return_inverse=True)[1]
    return torch.bincount(index[correct], minlength=int(index.max()) + 1 if index.numel() else 0)[index]
