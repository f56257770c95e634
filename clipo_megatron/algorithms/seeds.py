"""Random numbers that do not depend on the layout: a function of seed, step and prompt."""

from __future__ import annotations

import hashlib

from clipo_megatron.algorithms import late_torch as torch


def prompt_generator(seed: int, step: int, name: str) -> torch.Generator:
    """Return the random number generator of one prompt in one step; `name` is the prompt's id."""
    digest = hashlib.blake2b(f"{seed}\n{step}\n{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
