"""What can be wrong with weights, one exception a cause. All are ValueErrors with a sentence for the user."""

from __future__ import annotations


class WeightsError(ValueError):
    """Base of everything below."""


class UnsupportedModel(WeightsError):
    """The model's config.json asks for something that Megatron would compute differently.

    The message names the field and its value.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(f"config.json: {field}={value!r} is not supported: {reason}")
        self.field = field
        self.value = value


class WeightsFolderError(WeightsError):
    """A Hugging Face folder is incomplete or damaged; the message names the file or tensor."""


class CoverageError(WeightsError):
    """Parameters and tensors do not match one to one. `problems` holds one line each, the message all of them."""

    def __init__(self, problems: list[str]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"the weights do not cover the model exactly ({count}):\n  " + "\n  ".join(problems))
        self.problems = problems
