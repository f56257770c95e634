"""torch, imported when something of it is first used: `from clipo_megatron.algorithms import late_torch as torch`.

torch takes seconds to import. What a method is (its options, its needs, its defaults) stands on its class, and the
command line reads that without computing anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    return getattr(torch, name)
