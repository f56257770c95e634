"""What can be wrong with a plan."""


class PlanError(ValueError):
    """A layout or an option that cannot be planned; the message says what to change."""
