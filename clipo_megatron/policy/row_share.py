"""Context parallelism: the ranks of a group divide each packed row among themselves.

A row of T tokens is cut into 2 * cp chunks of the same size, and rank r has chunks r and 2 * cp - 1 - r. The later a
chunk, the more keys its queries see; so each rank has an early and a late one, and about the same work. Keys and values
are gathered where they are attended to, and their gradients are added up on the ranks that own them. What is computed
for single tokens, log-probs and values, is exchanged at the end: every rank then has those of the whole row, and
computes the same loss from them, but only the rank that owns a token sends gradients through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RowShare:
    """One rank's share of each packed row; of one rank, all of it.

    Attributes:
        rank, size: the rank's number in its group, and their count.
        group: the ranks that divide a row; None: there is one.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def chunks(self, total: int) -> tuple[slice, ...]:
        """The rank's chunks of a row of `total` tokens, a multiple of 2 * size where there are several ranks."""
        if self.size == 1:
            return (slice(0, total),)
        length = total // (2 * self.size)
        return tuple(slice(n * length, (n + 1) * length) for n in (self.rank, 2 * self.size - 1 - self.rank))

    def take(self, row: Tensor) -> Tensor:
        """The rank's part [T / size, ...] of a row [T, ...]."""
        return row if self.size == 1 else torch.cat([row[chunk] for chunk in self.chunks(row.shape[0])])

    def gathered(self, part: Tensor) -> Tensor:
        """The row [T, ...] of which each rank passes its part [T / size, ...]; collective, without gradient."""
        if self.size == 1:
            return part
        parts = part.new_empty(self.size, 2, part.shape[0] // 2, *part.shape[1:])
        dist.all_gather_into_tensor(parts.flatten(0, 2), part.contiguous(), group=self.group)
        return torch.cat([parts[:, 0], parts[:, 1].flip(0)]).flatten(0, 1)

    def scattered(self, row: Tensor) -> Tensor:
        """The rank's part [T / size, ...] of the sum of the rows [T, ...] that the ranks pass; collective."""
        if self.size == 1:
            return row
        first, last = row.unflatten(0, (2, self.size, -1))
        parts = torch.stack([first, last.flip(0)], 1).flatten(0, 2)
        part = row.new_empty(row.shape[0] // self.size, *row.shape[1:])
        dist.reduce_scatter_tensor(part, parts, group=self.group)
        return part

    def own(self, places: Tensor, total: int) -> tuple[Tensor, Tensor | slice]:
        """Which of some places [N] of a row of `total` tokens are this rank's.

        Returns:
            Where they are in the rank's part [n] int64, and which of `places` they are, [n] int64 or all of them.
        """
        if self.size == 1:
            return places, slice(None)
        early, late = self.chunks(total)
        is_early = (places >= early.start) & (places < early.stop)
        is_late = (places >= late.start) & (places < late.stop)
        within = torch.where(is_early, places - early.start, places - late.start + early.stop - early.start)
        chosen = (is_early | is_late).nonzero().squeeze(1)
        return within[chosen], chosen

    def shared(self, values: Tensor, chosen: Tensor | slice, count: int) -> Tensor:
        """All `count` values, of which this rank has those `chosen`; gradients flow to its own alone; collective."""
        if self.size == 1:
            return values
        everything = values.new_zeros(count, *values.shape[1:])
        everything[chosen] = values.detach()
        dist.all_reduce(everything, group=self.group)
        return everything.index_copy(0, chosen, values)

    def summed(self, values: Tensor) -> Tensor:
        """The sum of the `values` of all ranks, in place; collective, without gradient."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values


WHOLE_ROW = RowShare()
