"""The exceptions of this package, one for each cause. All are ValueErrors with a sentence for the user."""

from __future__ import annotations

_LONGEST_VALUE = 200  # characters of a value in a message
_LINES = 20  # most lines of a message: a wrong number of layers misses hundreds of tensors


class WeightsError(ValueError):
    """Base class of the others."""


class UnsupportedModel(WeightsError):
    """config.json asks for something that Megatron would compute differently; names the field and its value."""

    def __init__(self, field: str, value: object, reason: str) -> None:
        spelled = repr(value)
        spelled = spelled if len(spelled) <= _LONGEST_VALUE else f"{spelled[: _LONGEST_VALUE - 3]}..."
        super().__init__(f"config.json: {field}={spelled} is not supported: {reason}")
        self.field = field
        self.value = value


class WeightsFolderError(WeightsError):
    """A Hugging Face folder or checkpoint is incomplete or damaged; names the file or tensor."""


class CoverageError(WeightsError):
    """Parameters and tensors do not match one to one. `problems` has a line for each; the message has some of them."""

    def __init__(self, problems: list[str]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        lines = problems if len(problems) <= _LINES else [*problems[:_LINES], f"and {len(problems) - _LINES} more"]
        super().__init__(f"the weights do not cover the model exactly ({count}):\n  " + "\n  ".join(lines))
        self.problems = problems
