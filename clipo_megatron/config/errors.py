"""The error of a wrong configuration: all problems at once, each with its value, the reason and a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # characters that end a line or a word where nobody expects it


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing that is wrong. Reads `key = value: reason. Remedy.`"""

    key: str  # dotted; "" if the problem is not that of a single setting
    reason: str
    remedy: str
    value: object = None
    show_value: bool = True
    absent: bool = False  # whether it is only that a file or folder is not on this machine

    def __str__(self) -> str:
        subject = f"{self.key} = {spell(self.value)}" if self.show_value else self.key
        sentence = f"{subject}: {self.reason}" if subject else self.reason
        return f"{sentence.rstrip('.')}. {self.remedy}" + ("" if self.remedy.endswith(("?", ".")) else ".")


class ConfigError(ValueError):
    """A configuration that cannot be run. The message lists all problems found, and `problems` holds them."""

    def __init__(self, problems: Sequence[ConfigProblem] | str, *, origin: str = ""):
        self.problems = () if isinstance(problems, str) else tuple(problems)
        where = f" in {origin}" if origin else ""
        if isinstance(problems, str):
            message = problems
        elif len(self.problems) == 1:
            message = f"Configuration problem{where}: {self.problems[0]}"
        else:
            lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
            message = "\n".join([f"{len(lines)} configuration problems{where}:", *lines])
        super().__init__(message)


def is_for_users(error: object) -> bool:
    """Whether an error's message alone tells the user what to do: true of every exception that this package defines."""
    return type(error).__module__.partition(".")[0] == "clipo_megatron"


def spell(value: object) -> str:
    """A value as a YAML file would have it, cut to 80 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and hasattr(value, "value"):  # an enum of strings
        return str(value.value)
    text = value if isinstance(value, str) and value and value.strip() == value else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
