"""Positives and negatives of each anchor, counted from labels and groups alone in O(B log B)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CROSS = ("cross", "cross_opposite")  # levels with positives from the group and negatives from the batch


@dataclass(frozen=True, slots=True)
class Relations:
    """How many positives and negatives each row has as an anchor (the sets P(i) and A(i) of docs/method.md).

    Rows of the same `kind` are each other's positives: those with the same label in the group, or, at batch level,
    anywhere. Negatives have the other label, in the group at group level, anywhere at batch level and at
    cross_opposite; at cross level they are all other rows that are no positives.
    """

    group: Tensor  # [B] int64, 0 .. number of groups - 1, the caller's ids renumbered
    correct: Tensor  # [B] bool
    kind: Tensor  # [B] int64
    positives: Tensor  # [B] int64, |P(i)|, without i itself
    negatives: Tensor  # [B] int64, number of negatives in A(i)

    @classmethod
    def of(cls, correct: Tensor, group: Tensor, level: str) -> Relations:
        """Count them from `correct` [B] bool and `group` [B] integer, at one of the levels."""
        group = torch.unique(group, return_inverse=True)[1]
        label = correct.long()
        kind = label if level == "batch" else 2 * group + label
        by_kind = torch.bincount(kind, minlength=2)
        if level == "group":
            # A group without wrong (or without correct) rollouts may lie beyond the last kind that occurs.
            by_kind = torch.nn.functional.pad(by_kind, (0, 1))
            negatives = by_kind[kind ^ 1]
        elif level == "cross":
            negatives = len(label) - by_kind[kind]
        else:
            negatives = torch.bincount(label, minlength=2)[1 - label]
        return cls(group, correct, kind, by_kind[kind] - 1, negatives)

    def valid(self, anchors: str) -> Tensor:
        """Which rows are valid anchors, [B] bool: of the chosen label (correct, wrong or both), with a positive and a
        negative."""
        complete = (self.positives > 0) & (self.negatives > 0)
        if anchors == "both":
            return complete
        return complete & (self.correct if anchors == "correct" else ~self.correct)

    def partner(self, uniform: Tensor, sample: Tensor | None) -> Tensor:
        """The row of the positive drawn for each row, [B] int64: number floor(u * |P(i)|) of P(i). A row without a
        positive gets its own.

        Args:
            uniform: [B] float, u in [0, 1).
            sample: [B] integer, number of each rollout in its group. With it P(i) is counted in the order
                (group id, sample); without it, in the order of rows.
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

        # u * |P| may round up to |P|.
        number = torch.minimum((uniform.double() * self.positives).long(), self.positives - 1).clamp(min=0)
        number += (number >= place) & (self.positives > 0)
        return order[start + number]
