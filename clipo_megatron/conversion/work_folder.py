"""The hidden folder in which a conversion is written, beside its target, until the result takes the target's name.

.NAME.partial/
    lock       held while a process works here
    content/   becomes NAME, in one rename
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TextIO

from clipo_megatron.conversion.conversion import ConversionError
from clipo_megatron.runtime.durable_files import LockedError, lock, sync, sync_tree

_OWN = re.compile(r"lock|content|journal\.\d+\.jsonl")  # older releases wrote a journal
_SPARE_BYTES = 64 * 1024**2  # beyond the weights: tokenizer, metadata


class WorkFolder:
    """The work folder of one target; use it as a context manager.

    Entering takes the folder for this process and clears it of what a killed conversion left. Leaving removes it, so
    that the target is there as a whole (after `publish`) or not at all.

    Raises:
        ConversionError: the target exists, another process is writing it, or the folder cannot be made.
    """

    def __init__(self, target: Path) -> None:
        if not target.name:
            raise ConversionError(f"{target or '.'} is no folder to make. Name a new one.")
        self.target = target
        self.folder = target.with_name(f".{target.name}.partial")
        self.content = self.folder / "content"
        self._lock: TextIO | None = None

    def __enter__(self) -> WorkFolder:
        self._refuse_existing()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._acquire()
        except OSError as error:
            raise ConversionError(f"{self.target} cannot be written: {error}. Choose another place.") from error
        try:
            self._refuse_existing()  # the process that held the lock may have finished meanwhile
            for leftover in self.folder.iterdir():
                if leftover.name != "lock":
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            self.content.mkdir()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def check_space(self, nbytes: int) -> None:
        """Raise a ConversionError if the disk has no room for `nbytes`."""
        needed, free = nbytes + _SPARE_BYTES, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConversionError(
                f"{self.target} needs {needed:,} bytes ({needed / 1e9:.2f} GB), and {free:,} ({free / 1e9:.2f} GB) are "
                f"free there. Free {(needed - free) / 1e9:.2f} GB or choose another place"
            )

    def publish(self) -> None:
        """Give the result its name; every file in it is on disk already. From here on it is complete."""
        self._refuse_existing()
        sync_tree(self.content)
        os.rename(self.content, self.target)
        sync(self.target.parent)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target):
            raise ConversionError(
                f"{self.target} exists already, and nothing is overwritten. Remove it (rm -r {self.target}) or choose "
                "another name"
            )

    def _refuse_foreign(self) -> None:
        """Refuse a work folder that no conversion has made: it would be cleared."""
        if self.folder.is_symlink() or (
            self.folder.exists() and not all(_OWN.fullmatch(path.name) for path in self.folder.iterdir())
        ):
            raise ConversionError(
                f"{self.folder}, where {self.target.name} would be written, holds something else. Move it away, or "
                "choose another name"
            )

    def _acquire(self) -> None:
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                self._lock = lock(path)
            except FileNotFoundError:
                continue  # the process that held it has just removed the folder
            except LockedError as held:
                raise ConversionError(
                    f"{held.holder} is writing {self.target} already. Wait for it, end it, or choose another name"
                ) from None
            if self._lock is None or (path.exists() and os.path.samestat(os.fstat(self._lock.fileno()), path.stat())):
                return
            self._release()  # the process that held it has finished, and removed the folder
