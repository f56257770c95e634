"""The error of evaluations that the user can correct."""

from __future__ import annotations


class EvaluationError(ValueError):
    """There is nothing to evaluate, or results cannot be read or compared; the message says why, and the remedy."""
