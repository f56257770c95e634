"""The contrastive losses of CLIPO (arXiv 2603.10101), at a cost that grows with their sets.

At group level time and memory grow with B * G. At batch and cross level the work grows with B^2, but it is done for a
few anchors at a time and repeated in backward, so memory does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipo_megatron.algorithms.clipo.arguments import (
    ANCHORS,
    LEVELS,
    LOSSES,
    SIMILARITIES,
    check_names,
    check_temperature,
    check_tensors,
    row_mask,
)
from clipo_megatron.algorithms.clipo.head import normalise
from clipo_megatron.algorithms.clipo.pairs import Block, blocks, compare, l2_cost, log_sum_exp, released_log_sum
from clipo_megatron.algorithms.clipo.relations import Relations

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
    released_eps: bool = False,
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
        cross   P(i) from i's group; A(i) is every other rollout of the batch, those with i's label in other groups too,
                as in the released code
        cross_opposite   P(i) from i's group; A(i) = P(i) and every rollout of the batch with the other label. Rollouts
                with i's label in other groups are in neither set

    An anchor is valid with at least one positive and one negative. All other rows have loss 0, no gradient, and
    valid = False; a batch without valid anchors gives zeros and a zero gradient. The training loss of a head is
    `loss.sum() / valid.sum()` over the whole batch. Leave ungraded rollouts out: here every row is correct or wrong.

    Args:
        embeddings: [B, d], any float dtype; computed in float64 if they are float64, else in float32 (autocast is off).
        correct: [B] bool, the verifier's verdict, not the shaped reward.
        group: [B] integer, any ids, in any order; groups may differ in size.
        loss: infonce, supcon_out, supcon_in or soft_nn.
        level: group, batch, cross or cross_opposite.
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
        released_eps: whether 1e-8 is added to every sum of exponentials inside a logarithm, after the largest entry of
            the anchor's row, its similarity to itself included, is taken off, as the released code does. Where all of
            an anchor's cosines are low, that is up to 0.3 from the formula.

    Returns:
        Loss [B], float32 or float64, and valid mask [B], bool, on the device of the embeddings (the other tensors are
        moved there).

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: an unknown name, shapes that do not fit, a temperature that is not positive, rows outside the batch.
    """
    check_names(loss=(loss, LOSSES), level=(level, LEVELS), similarity=(similarity, SIMILARITIES))
    check_names(anchors=(anchors, ANCHORS))
    check_tensors(embeddings, correct, group, uniform, sample)
    check_temperature(temperature)
    if generator is not None and uniform is not None:
        raise ValueError("both generator and uniform were given: either draws the positives, pass one of them.")

    with torch.autocast(embeddings.device.type, enabled=False):
        vectors = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        # The verdicts often live on the CPU while the embeddings do not.
        device = embeddings.device
        correct, group = correct.to(device), group.to(device)
        relations = Relations.of(correct, group, level)
        valid = relations.valid(anchors) & row_mask(anchor_rows, correct)
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
        parts = list(blocks(relations, valid, partner, level, max(1, BLOCK // l2_cost(width))))
        for block in parts:
            arguments = (vectors, block, relations, loss, similarity, temperature, level, released_eps)
            if len(parts) > 1 and torch.is_grad_enabled() and vectors.requires_grad:
                found = checkpoint(_block_losses, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                found = _block_losses(*arguments)
            losses = losses.index_put((block.anchors[block.wanted],), found[block.wanted])
    return losses, valid


def _block_losses(
    vectors: Tensor,
    block: Block,
    relations: Relations,
    loss: str,
    similarity: str,
    temperature: float,
    level: str,
    released_eps: bool,
) -> Tensor:
    """Losses [k, a] of the block's anchors. Entries where `wanted` is False have no meaning and no gradient."""
    logits, positive, negative = compare(vectors, block, relations, similarity, temperature, level)
    if loss in ("supcon_in", "soft_nn"):
        if released_eps:
            separation = released_log_sum(logits, positive | negative) - released_log_sum(logits, positive)
        else:
            separation = -torch.nn.functional.logsigmoid(log_sum_exp(logits, positive) - log_sum_exp(logits, negative))
        return separation + positive.sum(-1).to(logits.dtype).log() if loss == "supcon_in" else separation
    if loss == "infonce":
        attraction = logits.gather(-1, block.partner[..., None]).squeeze(-1)
    else:
        attraction = logits.masked_fill(~positive, 0.0).sum(-1) / positive.sum(-1)
    whole = released_log_sum(logits, positive | negative) if released_eps else log_sum_exp(logits, positive | negative)
    return whole - attraction
