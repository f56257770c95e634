"""What a conversion consists of: units of work, each done by one thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Called with a number of bytes that were read or written; raises when the conversion is to stop.
Tick = Callable[[int], None]

UNIT_BYTES = 256 * 1024**2  # what one unit writes at most, unless a single parameter is larger
# What is read and written at a time: small enough that buffers are used again and stay near the caches.
PIECE_BYTES = 8 * 1024**2


class ConversionError(ValueError):
    """A conversion cannot be done; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A part of a conversion that one thread does from beginning to end."""

    name: str
    nbytes: int  # that it writes, approximately
    content: Any = field(repr=False)  # what the conversion needs to know to do it


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the source, with the size and checksum that its manifest gives."""

    path: Path
    nbytes: int
    crc32: int


class Conversion(ABC):
    """What is converted, from where to where. The constructor reads headers; weights are read by `write`."""

    target: Path
    units: Sequence[WorkUnit]
    source_files: Sequence[SourceFile]  # compared with their checksums before anything is written

    @property
    def nbytes(self) -> int:
        """Bytes that all units write."""
        return sum(unit.nbytes for unit in self.units)

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Bytes of weights of every file that will be written, by name."""

    @abstractmethod
    def prepare(self, content: Path) -> None:
        """Make what the units need in the empty folder `content`."""

    @abstractmethod
    def write(self, unit: WorkUnit, content: Path, tick: Tick) -> Sequence[Path]:
        """Do a unit and return the files it wrote to, which the caller forces to disk. Called by several threads."""

    @abstractmethod
    def finish(self, content: Path) -> None:
        """Write everything else, once all units are done."""

    @abstractmethod
    def close(self) -> None:
        """Close the source; calling it again does nothing."""
