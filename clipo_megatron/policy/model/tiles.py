"""How many logits exist at once: of the log-probs' tiles, and in the plan of a run's memory. Imports no torch."""

from __future__ import annotations

from math import isqrt

FP32 = 4  # bytes of a logit
# Bytes of fp32 logits that exist at once. A GPU keeps a tile of this size in its second-level cache (50 MiB and more)
# while exponentials and gradients are made of it; a CPU reads its weights less often with a larger one.
TILE_BYTES_ON_GPUS = 16 * 2**20
TILE_BYTES_ON_CPUS = 64 * 2**20


def tile_of(tokens: int, rows: int, nbytes: int) -> tuple[int, int]:
    """The tile of `nbytes` that is as square as the numbers of tokens and vocabulary rows allow.

    As square as possible, because then states, weights and the weight's gradient are read least often.
    """
    numel = nbytes // FP32
    tall = max(1, min(tokens, max(isqrt(numel), numel // max(rows, 1))))
    return tall, max(1, min(rows, numel // tall))
