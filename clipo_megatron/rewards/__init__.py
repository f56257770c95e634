"""Graders: is a response correct?

`grade` judges one response in this process. `GraderPool`, which training uses, judges many in worker processes that can
be killed, each answer with a deadline. Importing this package is cheap: SymPy, math-verify and reasoning-gym are loaded
by the first answer that needs them, and torch with the pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipo_megatron.rewards.modes import MODES, grade, mode_for

if TYPE_CHECKING:
    from clipo_megatron.rewards.pool import GraderPool, GraderStatistics

__all__ = ["MODES", "GraderPool", "GraderStatistics", "grade", "mode_for"]


def __getattr__(name: str) -> Any:
    if name in ("GraderPool", "GraderStatistics"):
        from clipo_megatron.rewards import pool  # imports torch, through the types of a step

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
