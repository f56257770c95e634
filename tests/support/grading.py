"""Grades single answers in a pool, and looks at its worker processes."""

from __future__ import annotations

from collections.abc import Iterable

from clipo_megatron.flow import Verdict
from clipo_megatron.rewards.pool import Answer, GraderPool


def grade_many(pool: GraderPool, answers: Iterable[Answer]) -> list[Verdict]:
    """The verdicts of `answers`, in their order."""
    return [verdict.result() for verdict in [pool.submit_answer(answer) for answer in answers]]


def worker_pids(pool: GraderPool) -> list[int]:
    """Process ids of the workers that run."""
    return [process.pid for process in pool._processes if process.pid is not None]
