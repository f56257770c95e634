"""Random numbers that do not depend on the layout: a function of seed, step and prompt."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from clipo_megatron.algorithms import late_torch as torch


def prompt_generator(seed: int, step: int, name: str) -> torch.Generator:
    """Return the random number generator of one prompt in one step; `name` is the prompt's id."""
    digest = hashlib.blake2b(f"{seed}\n{step}\n{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def told_apart(names: Sequence[str]) -> list[str]:
    """The names, each later copy with its number: ["a/1", "b/2", "a/1"] gives ["a/1", "b/2", "a/1#1"].

    Ids of prompts end with the number of a row, so that no id equals a numbered copy of another.
    """
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        found.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found
