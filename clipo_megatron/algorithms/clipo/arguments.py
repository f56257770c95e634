"""Checks of the arguments that losses and bonuses share."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor

from clipo_megatron.config.schema import Anchors, BonusForm, ContrastiveLossName, Level, Similarity

LOSSES, LEVELS, SIMILARITIES, ANCHORS, FORMS = (
    tuple(each.value for each in kind) for kind in (ContrastiveLossName, Level, Similarity, Anchors, BonusForm)
)


def row_mask(rows: Tensor | None, correct: Tensor) -> Tensor:
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


def check_names(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            near = get_close_matches(str(value), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}.{hint}")


def check_tensors(
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


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides the similarities, so it must be above 0.")
