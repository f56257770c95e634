"""SGLang's GPU kernels, absent."""

from absent_package import Missing, missing, pretend

__version__ = "0.4.10"  # SGLang compares it with the oldest release that it accepts
pretend(__name__)


def __getattr__(attribute: str) -> Missing:
    return missing(__name__, attribute)
