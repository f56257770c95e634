"""CLIPO as a library (arXiv 2603.10101): pure torch, importable without Megatron.

head = ContrastiveHead(hidden_size)
loss, valid = contrastive_loss(head(pooled), correct, group)
reward = reward + contrastive_reward(loss.detach(), valid & correct)
loss.sum().div(valid.sum().clamp(min=1)).backward()  # trains the head

torch is imported when one of these is first used: the command line reads of a run only what it is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipo_megatron.algorithms.clipo.forms import contrastive_bonus
    from clipo_megatron.algorithms.clipo.head import ContrastiveHead
    from clipo_megatron.algorithms.clipo.losses import contrastive_loss
    from clipo_megatron.algorithms.clipo.reward import contrastive_reward

__all__ = ["ContrastiveHead", "contrastive_bonus", "contrastive_loss", "contrastive_reward"]

_MODULES = {
    "ContrastiveHead": "head",
    "contrastive_bonus": "forms",
    "contrastive_loss": "losses",
    "contrastive_reward": "reward",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
