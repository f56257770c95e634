"""Who is whose positive, and which anchors are valid: counted from labels and groups alone, in O(B log B)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Relations:
    """The sets of METHOD P(i) and A(i), as counts a row.

    Rows with the same `kind` are each other's positives: same label within the group, or, at batch level, same label
    anywhere. Negatives have the other label, in the group at group level, anywhere at the other two.
    """

    group: Tensor  # [B] int64, 0 .. number of groups - 1, whatever the caller's ids were
    correct: Tensor  # [B] bool
    kind: Tensor  # [B] int64
    positives: Tensor  # [B] int64, |P(i)|, i itself left out
    negatives: Tensor  # [B] int64, how many negatives A(i) holds

    @classmethod
    def of(cls, correct: Tensor, group: Tensor, level: str) -> Relations:
        """Count from `correct` [B] bool and `group` [B] integer, at level group, batch or cross."""
        group = torch.unique(group, return_inverse=True)[1]
        label = correct.long()
        kind = label if level == "batch" else 2 * group + label
        by_kind = torch.bincount(kind, minlength=2)
        if level == "group":
            # A group without wrong (or without correct) rollouts may lie beyond the last kind that occurs.
            by_kind = torch.nn.functional.pad(by_kind, (0, 1))
            negatives = by_kind[kind ^ 1]
        else:
            negatives = torch.bincount(label, minlength=2)[1 - label]
        return cls(group, correct, kind, by_kind[kind] - 1, negatives)

    def valid(self, anchors: str) -> Tensor:
        """Anchors with a positive and a negative, [B] bool. `anchors` is correct, wrong or both."""
        complete = (self.positives > 0) & (self.negatives > 0)
        if anchors == "both":
            return complete
        return complete & (self.correct if anchors == "correct" else ~self.correct)

    def partner(self, uniform: Tensor, sample: Tensor | None) -> Tensor:
        """Row of the positive drawn for each row, [B] int64: number floor(u * |P(i)|) of P(i). Rows without a positive
        get their own.

        Args:
            uniform: [B] float, in [0, 1).
            sample: [B] integer, number of each rollout in its group. With it P(i) is counted in the order
                (group id, sample); without it, in row order.
        """
        order = torch.arange(self.kind.numel(), device=self.kind.device)
        if sample is not None:
            order = torch.argsort(sample, stable=True)
            order = order[torch.argsort(self.group[order], stable=True)]
        order = order[torch.argsort(self.kind[order], stable=True)]

        size = torch.bincount(self.kind)
        start = (size.cumsum(0) - size)[self.kind]
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        place -= start

        # The clamp guards against u * |P| rounding up to |P|.
        number = torch.minimum((uniform.double() * self.positives).long(), self.positives - 1).clamp(min=0)
        number += (number >= place) & (self.positives > 0)
        return order[start + number]
