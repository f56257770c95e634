"""Errors that the user of `clipo serve` can correct."""

from __future__ import annotations


class ServingError(RuntimeError):
    """A server cannot be set up, started or kept alive; the message has the reason and the remedy."""
