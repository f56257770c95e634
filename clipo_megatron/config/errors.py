"""The error of a wrong configuration: all problems at once, each with its value, the reason and a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # characters that end a line or a word where nobody expects it
_MOST_PROBLEMS = 20  # that one message lists
_LONGEST_LINE, _LONGEST_MESSAGE = 1_500, 6_000  # characters that a terminal is shown


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
            shown = self.problems[:_MOST_PROBLEMS]
            lines = [f"  {number}. {problem}" for number, problem in enumerate(shown, start=1)]
            if left := len(self.problems) - len(shown):
                lines.append(f"  and {left} more. Correct these first.")
            message = "\n".join([f"{len(self.problems)} configuration problems{where}:", *lines])
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
    try:
        text = value if isinstance(value, str) and value and value.strip() == value else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists in lists
        return f"{type(value).__name__} too large to be shown"
    return shortened(text, 80)


def counted(number: int, noun: str) -> str:
    """A number of things in words: "1 rank", "2 ranks"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters, with dots where some of its end are left out."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def for_terminal(message: str) -> str:
    """A message without characters that a terminal obeys, and without what no one would read of an endless one.

    The end of a line is kept, where the remedy is.
    """
    lines = message.splitlines()
    cut = [line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 500]} ... {line[-480:]}" for line in lines]
    kept = shortened("\n".join(cut), _LONGEST_MESSAGE)
    return "".join(each if each.isprintable() or each in "\n\t\xa0" else repr(each)[1:-1] for each in kept)
