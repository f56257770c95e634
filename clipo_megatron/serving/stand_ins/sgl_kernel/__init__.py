"""Stands in for SGLang's GPU kernels."""

from absent_package import Missing, missing, pretend

__version__ = "0.4.10"  # SGLang checks that it is new enough
pretend(__name__)


def __getattr__(attribute: str) -> Missing:
    return missing(__name__, attribute)
