"""The draw of InfoNCE's positives, the same in every layout: a pure function of seed, step, prompt and sample."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from clipo_megatron.algorithms.seeds import told_apart


def draws(prompt_ids: Sequence[str], group: Tensor, sample: Tensor | None, seed: int, step: int) -> Tensor:
    """Draw one uniform number for each rollout, for `contrastive_loss(uniform=...)`.

    The number is the leading 53 bits of BLAKE2b over (seed, step, prompt id, sample). It depends neither on the order
    of the rows, nor on the rank that computes it, nor on which other rollouts there are, nor on torch's generators.
    Where a prompt stands in a step more than once, its later groups get numbers of their own.

    Args:
        prompt_ids: the id of each group's prompt.
        group: [B] int64, index into `prompt_ids`.
        sample: [B] int64, number of each rollout within its group; None: its place among the group's rows.
        seed: the run's seed.
        step: the number of the step.

    Returns:
        [B] float64 in [0, 1), on the device of `group`.

    Raises:
        ValueError: an index in `group` has no prompt id, or `sample` has another shape.
    """
    if sample is not None and sample.shape != group.shape:
        raise ValueError(f"sample has shape {tuple(sample.shape)}, group {tuple(group.shape)}: give one of each a row.")
    seen = [0] * len(prompt_ids)
    keys = [blake2b(f"{int(seed)}/{int(step)}/{prompt}".encode(), digest_size=8) for prompt in told_apart(prompt_ids)]
    samples = None if sample is None else sample.tolist()
    uniform = []
    for row, index in enumerate(group.tolist()):
        if not 0 <= index < len(keys):
            raise ValueError(
                f"group[{row}] is {index}, but there are {len(keys)} prompt ids: group must index prompt_ids."
            )
        number = seen[index] if samples is None else samples[row]
        seen[index] += 1
        key = keys[index].copy()
        # A fixed width, so that no two pairs (prompt, sample) give the same bytes.
        key.update(number.to_bytes(8, "little", signed=True))
        uniform.append((int.from_bytes(key.digest(), "little") >> 11) * 2.0**-53)
    return torch.tensor(uniform, dtype=torch.float64, device=group.device)
