"""Files that are on disk when a call returns, their checksums, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_READ_BYTES = 1 << 22
_WRITE_BYTES = 1 << 18  # per system call; more are slower per byte
_RETRY_S = 0.1
_MOST_TEXT_BYTES = 1 << 28


class LockedError(RuntimeError):
    """Another process has the lock; `holder` names it: "process 17 on gpu3"."""

    def __init__(self, holder: str):
        super().__init__(f"locked by {holder}")
        self.holder = holder


def lock(path: Path, *, wait_s: float = 0.0) -> TextIO | None:
    """Lock a file until it is closed or this process ends, and write into it which process that is.

    Returns:
        The open file; None on file systems without locks.

    Raises:
        LockedError: another process still has the lock after `wait_s`.
        OSError: the file cannot be created.
    """
    file = path.open("a+")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_RETRY_S)
                continue
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise LockedError(holder) from None
        except OSError:
            file.close()
            return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def write_durably(path: Path, data: str | bytes) -> None:
    """Write a small file completely or not at all, and force it to disk."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def text_of(path: Path) -> str:
    """The text of a file that a person could read, which is read only where it is one.

    Raises:
        OSError: it is a device, a pipe or a folder, is far too large, or cannot be read. ValueError: it is no UTF-8.
    """
    refuse_unreadable(path)
    if (size := path.stat().st_size) > _MOST_TEXT_BYTES:
        raise OSError(errno.EFBIG, f"it has {size} bytes, and should have less than {_MOST_TEXT_BYTES}", str(path))
    return path.read_text(encoding="utf-8")


def refuse_unreadable(path: Path) -> None:
    """Raise OSError for a device, a pipe or a folder, which may never end; nothing where there is a file or nothing."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"it is {'a folder' if path.is_dir() else 'a device or a pipe'}", str(path))


def refuse_special(path: Path, begins: str = "") -> None:
    """Refuse to write where something else than a file is, or a file of another kind; a link stands for its target.

    Args:
        path: where a user asks for a file.
        begins: how files of its kind begin, so that a slip costs nobody a configuration or a data set; "": any may be
            overwritten.

    Raises:
        OSError: it is a device, a FIFO, a folder or a link to nothing, which would be replaced, or block for ever; or a
            file that does not begin like that.
    """
    if os.path.lexists(path) and not path.is_file():
        kind = "a folder" if path.is_dir() else "a link to nothing" if not path.exists() else "a device or a pipe"
        raise OSError(f"it is {kind}, and nothing but a file is overwritten")
    if begins and path.is_file():
        with path.open("rb") as file:
            found = file.read(len(begins.encode()))
        if found and found != begins.encode():
            raise OSError("it is a file of another kind, which is not overwritten")


def refuse_unwritable_file(path: Path) -> None:
    """Refuse a file that `write_output` could not write, before there is anything to write.

    Raises:
        OSError: its folder is not there or not writable, or `refuse_special` refuses it.
    """
    refuse_special(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")


def write_output(path: Path, data: str, begins: str = "") -> None:
    """Write a file that the user has named, completely or not at all; where it is a link, its target is written.

    Raises:
        OSError: it cannot be written, or `refuse_special` refuses it.
    """
    refuse_special(path, begins)
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force the contents of a file, or the list of names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force the lists of names in a folder and all folders below it to disk. The contents of files are not."""
    for place, _, _ in os.walk(folder):
        sync(Path(place))


def crc32(path: Path) -> int:
    """The CRC-32 of a file's contents."""
    code, buffer = 0, memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            code = zlib.crc32(buffer[:count], code)
    return code


def joined_crc32(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of two byte strings joined, from that of the `first` and that of the `second`, which has `nbytes`.

    Each byte that follows multiplies the remainder by x^8 modulo CRC-32's polynomial; bit 31 stands for x^0.
    """
    power, bits = 0, nbytes << 3
    while bits:
        if bits & 1:
            first = _times(_POWERS[power % 32], first)
        bits >>= 1
        power += 1
    return first ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo CRC-32's."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _powers() -> list[int]:
    """x^(2^n) for n = 0 .. 31, after which they repeat."""
    found = [0x40000000]
    while len(found) < 32:
        found.append(_times(found[-1], found[-1]))
    return found


_POLYNOMIAL = 0xEDB88320
_POWERS = _powers()


class FolderWriter:
    """Writes files into a folder, forces each to disk, and records its size and CRC-32.

    CRC-32 detects what disks and copies do to files (zlib's runs at some GB/s); it does not protect against intent.

    Attributes:
        written: {"bytes": ..., "crc32": ...} of each file, by its name relative to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, dict[str, int]] = {}

    def write(self, name: str, data: str | bytes) -> None:
        """Write a whole file."""
        with self.open(name) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    @contextmanager
    def open(self, name: str) -> Iterator[StreamedFile]:
        """Open a file that is written from its beginning to its end."""
        with StreamedFile(self.folder / name) as file:
            yield file
            file.sync()
        self.written[name] = {"bytes": file.nbytes, "crc32": file.crc32}


class StreamedFile(io.RawIOBase):
    """A file that is written from its beginning, and knows its size and CRC-32."""

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes, self.crc32 = path, 0, 0
        self._file = path.open("wb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """Append all bytes."""
        before = self.nbytes
        self.append(data)
        return self.nbytes - before

    def append(self, data: object) -> int:
        """Append all bytes, and return the CRC-32 of these alone. Other threads can run meanwhile."""
        view, code = memoryview(data).cast("B"), 0
        for start in range(
            0, len(view), _WRITE_BYTES
        ):  # small pieces, so that each is still in the cache for its checksum
            piece = view[start : start + _WRITE_BYTES]
            code = zlib.crc32(piece, code)
            while piece:
                piece = piece[self._file.write(piece) :]
        self.crc32 = joined_crc32(self.crc32, code, len(view))
        self.nbytes += len(view)
        return code

    def sync(self) -> None:
        """Force what was written so far to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()
        super().close()
