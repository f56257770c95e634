"""The contrastive losses of CLIPO (arXiv 2603.10101), at a cost that grows with their sets.

At group level the rows are gathered group by group, all groups of one size at a time, into [groups, G, d]: time and
memory grow with B * G, and no group is padded. At batch and cross level the work grows with B^2, but it is done for a
few anchors at a time and repeated in backward, so memory does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipo_megatron.algorithms.clipo.head import normalise
from clipo_megatron.algorithms.clipo.relations import Relations
from clipo_megatron.config.schema import Anchors, ContrastiveLossName, Level, Similarity

LOSSES, LEVELS, SIMILARITIES, ANCHORS = (
    tuple(each.value for each in kind) for kind in (ContrastiveLossName, Level, Similarity, Anchors)
)

# Number of similarities computed at once: 8 MiB in fp32, with about eight arrays of that size alive at the peak.
BLOCK = 2**21


def contrastive_loss(
    embeddings: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    loss: str = "infonce",
    level: str = "group",
    similarity: str = "cosine",
    temperature: float = 0.05,
    anchors: str = "correct",
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    sample: Tensor | None = None,
    anchor_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of every rollout (arXiv 2603.10101, section 3; SupCon: arXiv 2004.11362).

    For an anchor i with positives P(i) (same verdict as i) and contrast set A(i), and s_ij the similarity over the
    temperature:

        infonce      log sum_A exp(s_ia) - s_ip, one p drawn uniformly from P(i)
        supcon_out   log sum_A exp(s_ia) - mean over P of s_ip
        supcon_in    log sum_A exp(s_ia) - log mean over P of exp(s_ip)
        soft_nn      log sum_A exp(s_ia) - log sum over P of exp(s_ip)

        group   P(i) and A(i) from i's own group; A(i) is every other rollout of it
        batch   both from the whole batch; A(i) is every other rollout
        cross   P(i) from i's group, negatives from the whole batch: A(i) = P(i) and every rollout of the other label.
                Rollouts with i's label in other groups are in neither set

    An anchor is valid with at least one positive and one negative. All other rows have loss 0, no gradient, and
    valid = False; a batch without valid anchors gives zeros and a zero gradient. The training loss of a head is
    `loss.sum() / valid.sum()` over the whole batch. Leave ungraded rollouts out: here every row is correct or wrong.

    Args:
        embeddings: [B, d], any float dtype; computed in float64 if they are float64, else in float32 (autocast is off).
        correct: [B] bool, the verifier's verdict, not the shaped reward.
        group: [B] integer, any ids, in any order; groups may differ in size.
        loss: infonce, supcon_out, supcon_in or soft_nn.
        level: group, batch or cross.
        similarity: cosine (z_i . z_j, both normalised here), neg_cosine (its negative), or l2 (1 - ||z_i - z_j||, of
            the embeddings as given).
        temperature: divides the similarities.
        anchors: correct, wrong or both. A wrong anchor's positives are wrong, its negatives correct.
        generator: draws infonce's positives; None: torch's global generator, or `uniform`.
        uniform: [B] float in [0, 1), replaces the generator: row i's positive is number floor(u_i * |P(i)|) of P(i).
            `clipo_megatron.algorithms.clipo.draw.draws` gives numbers that do not depend on the layout.
        sample: [B] integer, number of each rollout within its group. With it P(i) is counted in the order
            (group id, sample), so that the draw does not depend on the order of rows; without it, in row order.
        anchor_rows: bool mask [B] or row indices: compute only these rows' losses, against all embeddings, at their
            share of the cost. The losses of a partition of the rows add up to the whole's, and so do the gradients.

    Returns:
        Loss [B], float32 or float64, and valid mask [B], bool, on the device of the embeddings (the other tensors are
        moved there).

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: an unknown name, shapes that do not fit, a temperature that is not positive, rows outside the batch.
    """
    _check_names(loss=(loss, LOSSES), level=(level, LEVELS), similarity=(similarity, SIMILARITIES))
    _check_names(anchors=(anchors, ANCHORS))
    _check_tensors(embeddings, correct, group, uniform, sample)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides the similarities, so it must be above 0.")
    if generator is not None and uniform is not None:
        raise ValueError("both generator and uniform were given: either draws the positives, pass one of them.")

    with torch.autocast(embeddings.device.type, enabled=False):
        vectors = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        # The verdicts often live on the CPU while the embeddings do not.
        device = embeddings.device
        correct, group = correct.to(device), group.to(device)
        relations = Relations.of(correct, group, level)
        valid = relations.valid(anchors) & _row_mask(anchor_rows, correct)
        partner = None
        if loss == "infonce":
            if uniform is None:
                # All B numbers, whatever the anchor rows, so that ranks with equal generators draw alike.
                source = device if generator is None else generator.device
                uniform = torch.rand(len(correct), generator=generator, device=source, dtype=torch.float64)
            partner = relations.partner(uniform.to(device), None if sample is None else sample.to(device))

        if similarity != "l2":
            vectors = normalise(vectors)
        # An empty sum ties the result to the graph, so that backward gives zeros where no anchor is valid.
        losses = vectors.new_zeros(len(correct)) + vectors[:0].sum()
        width = vectors.shape[1] if similarity == "l2" else 1
        blocks = list(_blocks(relations, valid, partner, level, max(1, BLOCK // _l2_cost(width))))
        for block in blocks:
            arguments = (vectors, block, relations, loss, similarity, temperature, level == "cross")
            if len(blocks) > 1 and torch.is_grad_enabled() and vectors.requires_grad:
                found = checkpoint(_block_losses, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                found = _block_losses(*arguments)
            losses = losses.index_put((block.anchors[block.wanted],), found[block.wanted])
    return losses, valid


@dataclass(frozen=True, slots=True)
class _Block:
    """Anchors whose losses are computed at once: k sets of a anchors, each against its own n candidates."""

    anchors: Tensor  # [k, a] int64, rows
    candidates: Tensor | None  # [k, n] int64, rows in ascending order; None: all rows of the batch, k = 1
    wanted: Tensor  # [k, a] bool, whether each is a valid anchor
    partner: Tensor | None  # [k, a] int64, column of each anchor's drawn positive among its candidates


def _blocks(relations: Relations, valid: Tensor, partner: Tensor | None, level: str, budget: int) -> Iterator[_Block]:
    """Cover the valid anchors with blocks of about `budget` similarities each."""
    if level != "group":
        rows = valid.nonzero().squeeze(1)
        for part in rows.split(max(1, budget // max(1, len(valid)))):
            if len(part):
                column = None if partner is None else partner[part][None]
                yield _Block(part[None], None, torch.ones_like(part, dtype=torch.bool)[None], column)
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
                yield _Block(anchors, candidates, valid[anchors], column)


def _block_losses(
    vectors: Tensor, block: _Block, relations: Relations, loss: str, similarity: str, temperature: float, cross: bool
) -> Tensor:
    """Losses [k, a] of the block's anchors. Entries where `wanted` is False have no meaning and no gradient."""
    if block.candidates is None:
        candidates, rows = vectors[None], torch.arange(len(vectors), device=vectors.device)[None]
    else:
        candidates, rows = _gather(vectors, block.candidates), block.candidates
    anchors = candidates if block.anchors is block.candidates else _gather(vectors, block.anchors)
    logits = _similarity(anchors, candidates, similarity) / temperature  # [k, a, n]

    # Unwanted anchors may lack positives or negatives: counting all their columns keeps them finite.
    unwanted = ~block.wanted[..., None]
    same = relations.correct[block.anchors][..., None] == relations.correct[rows][:, None]
    positive = same & (block.anchors[..., None] != rows[:, None])
    if cross:
        positive &= relations.group[block.anchors][..., None] == relations.group[rows][:, None]
    positive |= unwanted
    negative = ~same | unwanted

    if loss in ("supcon_in", "soft_nn"):
        odds = _log_sum_exp(logits, positive) - _log_sum_exp(logits, negative)
        separation = -torch.nn.functional.logsigmoid(odds)
        return separation + positive.sum(-1).to(odds.dtype).log() if loss == "supcon_in" else separation
    if loss == "infonce":
        attraction = logits.gather(-1, block.partner[..., None]).squeeze(-1)
    else:
        attraction = logits.masked_fill(~positive, 0.0).sum(-1) / positive.sum(-1)
    return _log_sum_exp(logits, positive | negative) - attraction


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


def _log_sum_exp(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")).logsumexp(-1)


def _l2_cost(width: int) -> int:
    """By how much a block must shrink for distances over `width` dimensions to fit into memory: on a GPU the backward
    of cdist holds every difference."""
    return max(1, width // 16)


def _row_mask(rows: Tensor | None, correct: Tensor) -> Tensor:
    """The rows as a mask [B] bool, from a mask, row indices, or None for all."""
    if rows is None:
        return torch.ones_like(correct)
    rows = rows.to(correct.device)
    if rows.dtype == torch.bool:
        if rows.shape != correct.shape:
            raise ValueError(f"anchor_rows is a mask of {tuple(rows.shape)}, the batch has {len(correct)} rows.")
        return rows
    if rows.dtype.is_floating_point or rows.ndim != 1:
        raise TypeError(f"anchor_rows is {rows.dtype} {tuple(rows.shape)}: pass a bool mask [B] or integer rows [M].")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(correct):
        raise ValueError(f"anchor_rows span {int(rows.min())} .. {int(rows.max())}, the batch has {len(correct)} rows.")
    return torch.zeros_like(correct).index_fill(0, rows.long(), True)


def _check_names(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            near = get_close_matches(str(value), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}.{hint}")


def _check_tensors(
    embeddings: Tensor, correct: Tensor, group: Tensor, uniform: Tensor | None, sample: Tensor | None
) -> None:
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"embeddings are {embeddings.dtype} {tuple(embeddings.shape)}: pass floats of shape [B, d].")
    if correct.dtype != torch.bool:
        raise TypeError(f"correct has dtype {correct.dtype}: pass the verifier's verdict as torch.bool, not a reward.")
    if group.is_floating_point() or group.dtype == torch.bool:
        raise TypeError(f"group has dtype {group.dtype}: pass integer ids.")
    for name, column in (("correct", correct), ("group", group), ("uniform", uniform), ("sample", sample)):
        if column is not None and column.shape != embeddings.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(column.shape)}, embeddings {tuple(embeddings.shape)}: one a row."
            )
