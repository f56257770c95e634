"""Stands in for torchvision, whose builds need the exact build of torch that they were made for."""

from absent_package import Missing, missing, pretend

__version__ = "0.0.0"
pretend(__name__)


def __getattr__(attribute: str) -> Missing:
    return missing(__name__, attribute)
