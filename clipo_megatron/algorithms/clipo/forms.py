"""Forms of the bonus: as in the paper, its expectation over the draw, and the standardised ratio of means."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.algorithms.clipo.arguments import (
    FORMS,
    LEVELS,
    LOSSES,
    SIMILARITIES,
    check_names,
    check_temperature,
    check_tensors,
    row_mask,
)
from clipo_megatron.algorithms.clipo.head import normalise
from clipo_megatron.algorithms.clipo.losses import BLOCK, contrastive_loss
from clipo_megatron.algorithms.clipo.pairs import blocks, compare, l2_cost, log_sum_exp, released_log_sum
from clipo_megatron.algorithms.clipo.relations import Relations
from clipo_megatron.algorithms.clipo.reward import compared, contrastive_reward, has_scores, standardised_reward


def contrastive_bonus(
    embeddings: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    form: str = "paper",
    loss: str = "infonce",
    level: str = "group",
    similarity: str = "cosine",
    temperature: float = 0.05,
    weight: float = 0.2,
    floor: float = -0.5,
    constant: float = 0.0,
    calibrate: bool = False,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    sample: Tensor | None = None,
    released_eps: bool = False,
) -> Tensor:
    """The bonus of every rollout; 0 where none is paid: to wrong rollouts, and without a positive or a negative.

    With s_ij the similarity over the temperature, P the correct rollouts that i is compared with, i left out, N its
    negatives and A = P and N together (sets and levels as in `contrastive_loss`):

        paper      max(constant - weight * L_i, floor), L_i the loss (arXiv 2603.10101, section 3)
        expected   mean over p in P of max(constant - weight * L_ip, floor), L_ip = log sum_A exp(s_ia) - s_ip:
                   what `paper` pays with infonce, in expectation over its draw
        ratio      weight * clip((g_i - mean g) / (deviation of g + 1e-3), -2, 2), its mean taken off once more, of
                   g_i = log mean_P exp(s_ip) - log mean_N exp(s_in); see `standardised_reward`

    supcon_in and soft_nn have one term for all positives, and no draw: with them `expected` pays what `paper` pays.
    `ratio` reads no loss, floor, constant, calibrate or released_eps.

    Args:
        embeddings, correct, group, loss, level, similarity, temperature, generator, uniform, sample,
            released_eps: as in `contrastive_loss`.
        form: paper, expected or ratio.
        weight, floor, constant, calibrate: as in `contrastive_reward`.

    Returns:
        [B] float32, float64 where the embeddings are; without gradient.

    Raises:
        TypeError, ValueError: as `contrastive_loss`.
    """
    check_names(form=(form, FORMS), loss=(loss, LOSSES), level=(level, LEVELS))
    with torch.no_grad():
        if not has_scores(form, loss):
            losses, valid = contrastive_loss(
                embeddings,
                correct,
                group,
                loss=loss,
                level=level,
                similarity=similarity,
                temperature=temperature,
                generator=generator,
                uniform=uniform,
                sample=sample,
                released_eps=released_eps,
            )
            counts = compared(correct.to(valid.device), group.to(valid.device), level, loss) if calibrate else None
            return contrastive_reward(
                losses,
                valid,
                weight=weight,
                floor=floor,
                constant=constant,
                calibrate=calibrate,
                group_sizes=counts,
            )
        scores, valid = contrastive_scores(
            embeddings,
            correct,
            group,
            form=form,
            level=level,
            similarity=similarity,
            temperature=temperature,
            weight=weight,
            floor=floor,
            constant=constant,
            calibrate=calibrate,
            released_eps=released_eps,
        )
        if form == "expected":
            return scores
        among = torch.zeros_like(group) if level == "batch" else group
        return standardised_reward(scores, valid, among.to(valid.device), weight=weight)


@torch.no_grad()
def contrastive_scores(
    embeddings: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    form: str,
    level: str = "group",
    similarity: str = "cosine",
    temperature: float = 0.05,
    weight: float = 0.2,
    floor: float = -0.5,
    constant: float = 0.0,
    calibrate: bool = False,
    anchor_rows: Tensor | None = None,
    released_eps: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the bonus of each correct rollout is made of, for a part of the rows if need be; no gradient.

    For `expected` the bonus itself, for `ratio` g_i, both as in `contrastive_bonus`, whose arguments these are;
    `anchor_rows` as in `contrastive_loss`.

    Returns:
        [B] float32 or float64, 0 where there is none, and which rows have one, [B] bool.
    """
    check_names(form=(form, ("expected", "ratio")), level=(level, LEVELS), similarity=(similarity, SIMILARITIES))
    check_tensors(embeddings, correct, group, None, None)
    check_temperature(temperature)
    with torch.autocast(embeddings.device.type, enabled=False):
        vectors = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        correct, group = correct.to(vectors.device), group.to(vectors.device)
        relations = Relations.of(correct, group, level)
        valid = relations.valid("correct") & row_mask(anchor_rows, correct)
        if similarity != "l2":
            vectors = normalise(vectors)
        scores = vectors.new_zeros(len(correct))
        width = vectors.shape[1] if similarity == "l2" else 1
        for block in blocks(relations, valid, None, level, max(1, BLOCK // l2_cost(width))):
            logits, positive, negative = compare(vectors, block, relations, similarity, temperature, level)
            count = positive.sum(-1).to(logits.dtype)
            if form == "ratio":
                against = negative.sum(-1).to(logits.dtype)
                found = log_sum_exp(logits, positive) - count.log()
                found = found - (log_sum_exp(logits, negative) - against.log())
            else:
                total = released_log_sum if released_eps else log_sum_exp
                losses = total(logits, positive | negative)[..., None] - logits
                if calibrate:
                    losses = losses - count.log()[..., None]
                paid = (constant - weight * losses).clamp(min=floor)
                found = paid.masked_fill(~positive, 0.0).sum(-1) / count
            scores[block.anchors[block.wanted]] = found[block.wanted]
    return scores, valid
