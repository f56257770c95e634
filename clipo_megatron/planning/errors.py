"""The error that planning raises."""


class PlanError(ValueError):
    """A layout or an option that cannot be planned; the message says what to change."""
