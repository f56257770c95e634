"""What a conversion is made of: units of work, and what each has written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Told how many bytes were read or written; raises when the conversion is to stop.
Tick = Callable[[int], None]

UNIT_BYTES = 256 * 1024**2  # of one unit, or of one parameter that is larger
PIECE_BYTES = 8 * 1024**2  # moved at a time; small enough that buffers are used again and stay near the caches


class ConversionError(ValueError):
    """A conversion cannot be done; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that one unit wrote."""

    file: str
    start: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Record:
    """A finished unit: a line of the journal."""

    unit: str
    spans: tuple[Span, ...]
    items: tuple[Any, ...] = ()  # what `finish` needs to know of it; JSON values

    def as_json(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> Record:
        """From the journal."""
        return Record(line["unit"], tuple(Span(**span) for span in line["spans"]), tuple(line["items"]))


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A part of a conversion that one thread does from beginning to end."""

    name: str
    nbytes: int  # that it writes, nearly
    content: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Check:
    """A file of the source and what it must be."""

    file: Path
    nbytes: int
    crc32: int


class Conversion(ABC):
    """What is converted, from where to where. Reads nothing but headers until `write` is called."""

    target: Path
    units: Sequence[WorkUnit]
    checks: Sequence[Check]  # of the source, before anything is written
    facts: Mapping[str, Any]  # what must be the same for a conversion to go on from another's journal

    @property
    def nbytes(self) -> int:
        """That all units write."""
        return sum(unit.nbytes for unit in self.units)

    @abstractmethod
    def prepare(self, content: Path) -> None:
        """Make the folder's files as far as units need that; may find them there already."""

    @abstractmethod
    def write(self, unit: WorkUnit, content: Path, tick: Tick) -> Record:
        """Do a unit; when this returns, its spans are written, and whoever called forces their files to disk."""

    @abstractmethod
    def finish(self, content: Path, records: Sequence[Record]) -> None:
        """Write all else, once the units are done."""

    @abstractmethod
    def close(self) -> None:
        """Close the source. Idempotent."""
