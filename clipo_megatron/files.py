"""Files that are on disk when a call returns, and their checksums."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

_READ_BYTES = 1 << 22


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
