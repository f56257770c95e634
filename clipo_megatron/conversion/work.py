"""The hidden folder that a conversion works in, beside its target, until the result takes the target's name.

.NAME.partial/
    lock             held while somebody works here
    facts.json       what is converted and how: another conversion's leftovers are thrown away
    journal.N.jsonl  a line a finished unit, of rank N
    content/         becomes NAME, in one rename
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from clipo_megatron.conversion.plan import ConversionError, Record, Span, Tick
from clipo_megatron.runtime.durable_files import Held, lock, sync, sync_tree, write_durably

_SPARE_BYTES = 64 * 1024**2  # beyond the weights: tokenizer, metadata, the journal
_READ_BYTES = 1 << 22


class WorkFolder:
    """The folder of one conversion, as one process sees it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.partial")
        self.content = self.folder / "content"
        self._lock: TextIO | None = None

    # --- the process that leads --------------------------------------------------------------------------------------

    def claim(self, facts: Mapping[str, Any]) -> str:
        """Take the folder for this process, and clear it of what another conversion left.

        Returns:
            What was found, to be told; "" for nothing.

        Raises:
            ConversionError: the target exists, somebody else is at work, or the folder cannot be made.
        """
        self._refuse_existing()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._refuse_existing()  # whoever held the lock may have finished meanwhile
            found = self._facts()
            wanted = json.loads(json.dumps(facts))
            said = ""
            if found != wanted:
                leftovers = [path for path in self.folder.iterdir() if path.name != "lock"]
                for path in leftovers:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                said = f"removed what another conversion had left in {self.folder}" if leftovers else ""
                write_durably(self.folder / "facts.json", json.dumps(wanted))
            self.content.mkdir(exist_ok=True)
        except OSError as error:
            raise ConversionError(f"{self.target} cannot be written: {error}. Choose another place.") from error
        return said

    def check_space(self, nbytes: int) -> None:
        """Raise a ConversionError where the disk has no room for `nbytes` more."""
        needed, free = nbytes + _SPARE_BYTES, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConversionError(
                f"{self.target} needs {needed:,} more bytes ({needed / 1e9:.2f} GB), and {free:,} ({free / 1e9:.2f} "
                f"GB) are free there. Free {(needed - free) / 1e9:.2f} GB or choose another place; the same command "
                "goes on from what is there"
            )

    def publish(self) -> None:
        """Give the result its name; everything in it is on disk already. From here on it is complete."""
        self._refuse_existing()
        sync_tree(self.content)
        os.rename(self.content, self.target)
        sync(self.target.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let go of the lock. Idempotent."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- everybody ---------------------------------------------------------------------------------------------------

    def records(self) -> dict[str, Record]:
        """Finished units by name; a line that a killed process did not finish is none."""
        found: dict[str, Record] = {}
        for journal in sorted(self.folder.glob("journal.*.jsonl")):
            for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = Record.from_json(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    continue
                found[record.unit] = record
        return found

    def holds(self, record: Record, tick: Tick) -> bool:
        """Whether what a record says was written is there, by its CRC-32."""
        return all(self._crc32(span, tick) == span.crc32 for span in record.spans)

    def journal(self, rank: int) -> Journal:
        """To note finished units in."""
        return Journal(self.folder / f"journal.{rank}.jsonl")

    def _crc32(self, span: Span, tick: Tick) -> int | None:
        try:
            with (self.content / span.file).open("rb", buffering=0) as file:
                return crc32_of(file.fileno(), span.start, span.nbytes, tick)
        except OSError:
            return None

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target):
            raise ConversionError(
                f"{self.target} exists already, and nothing is overwritten. Remove it (rm -r {self.target}) or choose "
                "another name"
            )

    def _acquire(self) -> None:
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                self._lock = lock(path)
            except Held as held:
                raise ConversionError(
                    f"{held.holder} is writing {self.target} already. Wait for it, end it, or choose another name"
                ) from None
            if self._lock is None or (path.exists() and os.path.samestat(os.fstat(self._lock.fileno()), path.stat())):
                return
            self.release()  # whoever held it has finished, and removed the folder

    def _facts(self) -> Any:
        try:
            return json.loads((self.folder / "facts.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


class Journal:
    """Finished units of one rank; a line is there when `note` returns. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")  # ends a line that a killed process did not

    def note(self, record: Record) -> None:
        """Add a unit."""
        self._file.write(json.dumps(record.as_json()) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def crc32_of(descriptor: int, start: int, nbytes: int, tick: Tick) -> int | None:
    """Of bytes of an open file; None where it ends before."""
    buffer = memoryview(bytearray(min(_READ_BYTES, nbytes) or 1))
    code, done = 0, 0
    while done < nbytes:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), nbytes - done)]], start + done)
        if not count:
            return None
        code = zlib.crc32(buffer[:count], code)
        done += count
        tick(count)
    return code
