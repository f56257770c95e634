"""Files that are on disk when a call returns, their checksums, and locks between processes."""

from __future__ import annotations

import fcntl
import io
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_READ_BYTES = 1 << 22
_WRITE_BYTES = 1 << 18  # of one system call; larger ones cost more a byte
_RETRY_S = 0.1


class Held(RuntimeError):
    """Another process has the lock; `holder` says which, as "process 17 on gpu3"."""

    def __init__(self, holder: str):
        super().__init__(f"held by {holder}")
        self.holder = holder


def lock(path: Path, *, wait_s: float = 0.0) -> TextIO | None:
    """Hold a file until it is closed, or this process ends; it says by whom it is held.

    Returns:
        The open file; None on file systems without locks.

    Raises:
        Held: by another process, for `wait_s` and longer.
        OSError: the file cannot be made.
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
            raise Held(holder) from None
        except OSError:
            file.close()
            return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def write_durably(path: Path, data: str | bytes) -> None:
    """Write a small file, all of it or nothing."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Force a file's contents, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force the names in a folder, and in those below it, to disk. Files are forced by those who write them."""
    for place, _, _ in os.walk(folder):
        sync(Path(place))


def crc32(path: Path) -> int:
    """Of a file's contents."""
    code, buffer = 0, memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            code = zlib.crc32(buffer[:count], code)
    return code


def joined_crc32(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of two runs of bytes, one after the other, by their own; `nbytes` of the second.

    Bytes that follow multiply a remainder by x^8 each, modulo CRC-32's polynomial, in which bit 31 is x^0.
    """
    power, bits = 0, nbytes << 3
    while bits:
        if bits & 1:
            first = _times(_POWERS[power % 32], first)
        bits >>= 1
        power += 1
    return first ^ second


def _times(a: int, b: int) -> int:
    """Product of two polynomials modulo CRC-32's."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _powers() -> list[int]:
    """x^(2^n) for n = 0 .. 31; from there on they repeat."""
    found = [0x40000000]
    while len(found) < 32:
        found.append(_times(found[-1], found[-1]))
    return found


_POLYNOMIAL = 0xEDB88320
_POWERS = _powers()


class FolderWriter:
    """Writes files of a folder, each forced to disk, and keeps size and CRC-32 of every one.

    CRC-32 finds what disks and copies do to files (zlib's runs at some GB/s); it is no defence against intent.

    Attributes:
        written: {"bytes": ..., "crc32": ...} by name relative to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, dict[str, int]] = {}

    def write(self, name: str, data: str | bytes) -> None:
        """A whole file."""
        with self.open(name) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    @contextmanager
    def open(self, name: str) -> Iterator[StreamedFile]:
        """A file to be written from its beginning to its end."""
        with StreamedFile(self.folder / name) as file:
            yield file
            file.sync()
        self.written[name] = {"bytes": file.nbytes, "crc32": file.crc32}


class StreamedFile(io.RawIOBase):
    """A file that is written from its beginning, with its size and CRC-32."""

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes, self.crc32 = path, 0, 0
        self._file = path.open("wb", buffering=0)

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: object) -> int:
        """Append all of it."""
        before = self.nbytes
        self.append(data)
        return self.nbytes - before

    def append(self, data: object) -> int:
        """Append all of it, and return the CRC-32 of it alone. Other threads run meanwhile."""
        view, code = memoryview(data).cast("B"), 0
        for start in range(0, len(view), _WRITE_BYTES):  # its checksum is taken while it is in the cache
            piece = view[start : start + _WRITE_BYTES]
            code = zlib.crc32(piece, code)
            while piece:
                piece = piece[self._file.write(piece) :]
        self.crc32 = joined_crc32(self.crc32, code, len(view))
        self.nbytes += len(view)
        return code

    def sync(self) -> None:
        """Force what was written to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Idempotent."""
        self._file.close()
        super().close()
