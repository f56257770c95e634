"""Errors of submissions and scaling studies."""


class SubmissionError(RuntimeError):
    """A job cannot be submitted; the message says why, and what to change."""


class ScalingError(ValueError):
    """A scaling study cannot be run or compared; the message says what to change."""
