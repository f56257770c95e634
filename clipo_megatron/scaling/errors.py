"""What can be wrong with a ladder."""


class ScalingError(ValueError):
    """A ladder that cannot be run or compared; the message says what to change."""
