"""What goes wrong around evaluations, for the user to correct."""

from __future__ import annotations


class EvaluationError(ValueError):
    """There is nothing to evaluate, or two results cannot be compared; the message names which, why, and the remedy."""
