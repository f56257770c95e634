"""The ledger of prompts (prompts.jsonl): each prompt that was drawn is trained once, or dropped for a named reason.

Prompts are known by their number in the order of drawing. A line tells what became of prompts in its step; a prompt
that no line names is still open, and the checkpoint of that time holds it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from clipo_megatron.telemetry.sinks import append, keep_before, writing

# The fields of `Accounts` that say why a prompt does not train.
REASONS = ("zero_advantage", "unfinished")


@dataclass(frozen=True, slots=True)
class Accounts:
    """What became of prompts in a step; those of it that grow in windows are trained when their last window is."""

    step: int
    drawn: int  # prompts drawn so far, by this step and all before
    trained: list[int]
    zero_advantage: list[int]  # dropped: all its answers were right or all wrong, and dynamic sampling replaced it
    unfinished: list[int]  # dropped: over-sampling asked for it, and others finished first


class Ledger:
    """Writes a line for each step."""

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO | None = None

    def open(self, *, from_step: int) -> None:
        """Open the ledger; lines of steps from `from_step` on are dropped, because these steps are done again."""
        keep_before(self.path, from_step)
        with writing(self.path):
            self._file = self.path.open("a", buffering=1)

    def write(self, accounts: Accounts) -> None:
        """Write the line of a step, with numbers as ranges [first, end)."""
        if self._file is None:
            return
        line = asdict(accounts)
        for name in ("trained", *REASONS):
            line[name] = _ranges(line[name])
        append(self._file, json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True, slots=True)
class Balance:
    """What a ledger says in all."""

    drawn: int
    trained: Counter[int]  # prompt -> how often it trained
    dropped: dict[int, str]  # prompt -> reason

    @property
    def open(self) -> set[int]:
        """The prompts that are neither trained nor dropped."""
        return set(range(self.drawn)) - self.trained.keys() - self.dropped.keys()

    def problems(self, open_prompts: Iterable[int] = ()) -> list[str]:
        """What is wrong, given the open prompts of a checkpoint of the same step; [] if all is accounted for."""
        held = set(open_prompts)
        found = [f"prompt {each} trained {times} times" for each, times in self.trained.items() if times > 1]
        found += [f"prompt {each} trained and was dropped" for each in self.trained.keys() & self.dropped.keys()]
        found += [f"prompt {each} is neither trained, dropped nor open" for each in sorted(self.open - held)]
        found += [f"prompt {each} is open, and trained or dropped before" for each in sorted(held - self.open)]
        return found


def balance(lines: Iterable[Mapping[str, Any]]) -> Balance:
    """Add up the lines of a ledger."""
    drawn, trained, dropped = 0, Counter[int](), {}
    for line in lines:
        drawn = line["drawn"]
        trained.update(_numbers(line["trained"]))
        for reason in REASONS:
            dropped |= dict.fromkeys(_numbers(line[reason]), reason)
    return Balance(drawn, trained, dropped)


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Sorted numbers as ranges: [1, 2, 3, 7] gives [[1, 4], [7, 8]]."""
    found: list[list[int]] = []
    for each in numbers:
        if found and found[-1][1] == each:
            found[-1][1] = each + 1
        else:
            found.append([each, each + 1])
    return found


def _numbers(ranges: Iterable[Iterable[int]]) -> Iterator[int]:
    return (number for first, end in ranges for number in range(first, end))
