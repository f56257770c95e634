"""What can be wrong with a submission."""


class SubmissionError(RuntimeError):
    """A job cannot be submitted; the message says why, and what to change."""
