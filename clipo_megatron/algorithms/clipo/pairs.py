"""The pairs of anchors and candidates whose similarities losses and bonuses are made of, a few anchors at a time.

At group level the rows are gathered group by group, all groups of one size at a time, into [groups, G, d]: time and
memory grow with B * G, and no group is padded. At batch and cross level the work grows with B^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_megatron.algorithms.clipo.relations import CROSS, Relations

RELEASED_EPSILON = 1e-8  # what the released code adds to sums of exponentials


@dataclass(frozen=True, slots=True)
class Block:
    """Anchors whose losses are computed at once: k sets of a anchors, each against its own n candidates."""

    anchors: Tensor  # [k, a] int64, rows
    candidates: Tensor | None  # [k, n] int64, rows in ascending order; None: all rows of the batch, k = 1
    wanted: Tensor  # [k, a] bool, whether each is a valid anchor
    partner: Tensor | None  # [k, a] int64, column of each anchor's drawn positive among its candidates


def blocks(relations: Relations, valid: Tensor, partner: Tensor | None, level: str, budget: int) -> Iterator[Block]:
    """Cover the valid anchors with blocks of about `budget` similarities each."""
    if level != "group":
        rows = valid.nonzero().squeeze(1)
        for part in rows.split(max(1, budget // max(1, len(valid)))):
            if len(part):
                column = None if partner is None else partner[part][None]
                yield Block(part[None], None, torch.ones_like(part, dtype=torch.bool)[None], column)
        return

    group = relations.group
    order = torch.argsort(group, stable=True)
    size = torch.bincount(group)
    start = size.cumsum(0) - size
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - start[group[order]]
    needed = torch.bincount(group[valid], minlength=len(size)) > 0
    for n in size[needed].unique().tolist():
        first = start[needed & (size == n)]
        for part in first.split(max(1, budget // (n * n))):
            candidates = order[part[:, None] + torch.arange(n, device=order.device)]
            # A group too large for one block is cut into several sets of anchors.
            whole = n * n <= budget
            for anchors in [candidates] if whole else candidates.split(max(1, budget // n), dim=1):
                column = None if partner is None else place[partner[anchors]]
                yield Block(anchors, candidates, valid[anchors], column)


def compare(
    vectors: Tensor, block: Block, relations: Relations, similarity: str, temperature: float, level: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The similarities of a block's anchors to its candidates over the temperature, [k, a, n], and which of these are
    positives and negatives of the anchor, [k, a, n] bool each. Of an anchor that is not wanted all are both."""
    if block.candidates is None:
        candidates, rows = vectors[None], torch.arange(len(vectors), device=vectors.device)[None]
    else:
        candidates, rows = _gather(vectors, block.candidates), block.candidates
    anchors = candidates if block.anchors is block.candidates else _gather(vectors, block.anchors)
    logits = _similarity(anchors, candidates, similarity) / temperature

    # Unwanted anchors may lack positives or negatives: counting all their columns keeps them finite.
    unwanted = ~block.wanted[..., None]
    same = relations.correct[block.anchors][..., None] == relations.correct[rows][:, None]
    positive = same & (block.anchors[..., None] != rows[:, None])
    if level in CROSS:
        positive &= relations.group[block.anchors][..., None] == relations.group[rows][:, None]
    negative = ~same
    if level == "cross":
        negative = ~positive & (block.anchors[..., None] != rows[:, None])
    return logits, positive | unwanted, negative | unwanted


def _gather(vectors: Tensor, rows: Tensor) -> Tensor:
    """Gather `vectors` by rows [k, n] -> [k, n, d]. In backward `index_select` adds rows up, where indexing sorts
    them."""
    return vectors.index_select(0, rows.flatten()).view(*rows.shape, -1)


def _similarity(anchors: Tensor, candidates: Tensor, similarity: str) -> Tensor:
    """Similarities of [k, a, d] and [k, n, d]: [k, a, n]. Cosines expect normalised vectors."""
    if similarity == "l2":
        # Differences, not |a|^2 + |b|^2 - 2ab, whose cancellation would cost half the digits of a small distance. The
        # gradient of cdist at distance 0 is 0.
        return 1.0 - torch.cdist(anchors, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    cosine = anchors @ candidates.transpose(1, 2)
    return cosine if similarity == "cosine" else -cosine


def log_sum_exp(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")).logsumexp(-1)


def released_log_sum(logits: Tensor, mask: Tensor) -> Tensor:
    """log(sum of exp(logits - m) + 1e-8) + m over the entries in `mask`, m the largest of all entries of the row."""
    largest = logits.detach().amax(-1, keepdim=True)
    total = (logits - largest).exp().masked_fill(~mask, 0.0).sum(-1)
    return (total + RELEASED_EPSILON).log() + largest.squeeze(-1)


def l2_cost(width: int) -> int:
    """By how much a block must shrink for distances over `width` dimensions to fit into memory: on a GPU the backward
    of cdist holds every difference."""
    return max(1, width // 16)
