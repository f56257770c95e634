"""Random numbers that do not depend on the layout: a function of seed, step and prompt."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, step: int, name: str) -> torch.Generator:
    """The generator of the prompt called `name` in one step."""
    digest = hashlib.blake2b(f"{seed}\n{step}\n{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
