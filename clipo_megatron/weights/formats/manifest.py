"""The manifest of a checkpoint: size and CRC-32 of each of its files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from clipo_megatron.runtime.durable_files import crc32
from clipo_megatron.weights.errors import WeightsFolderError

MANIFEST = "manifest.json"


def manifest_defects(path: str | Path, *, contents: bool = True) -> list[str]:
    """Compare a checkpoint's files with its manifest; return a sentence for each defect.

    Args:
        path: the checkpoint.
        contents: whether to compare the bytes too, by CRC-32, and not only names and sizes.
    """
    folder = Path(path)
    try:
        written = manifest(folder)
    except WeightsFolderError as error:
        return [str(error)]
    return [defect for name, entry in written.items() if (defect := _defect(folder / name, entry, contents))]


def manifest(folder: Path) -> Mapping[str, Mapping[str, int]]:
    """Read "bytes" and "crc32" of every file of a checkpoint, by name.

    Raises:
        WeightsFolderError: there is no manifest, so the checkpoint is incomplete, or the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: {"bytes": int(entry["bytes"]), "crc32": int(entry["crc32"])} for name, entry in files.items()}
    except FileNotFoundError:
        raise WeightsFolderError(f"{folder} has no {MANIFEST}: it is no complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsFolderError(f"{path} is damaged: {error!r}") from error


def _defect(file: Path, entry: Mapping[str, int], contents: bool) -> str:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file} has {size} bytes, {entry['bytes']} were written"
        if contents and crc32(file) != entry["crc32"]:
            return f"the bytes of {file} are not those that were written"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return ""


def read_checked(file: Path) -> bytes:
    """Read a file of a checkpoint's policy/ and compare it with the manifest, if there is one.

    For pickles, which must not be loaded when they were changed.

    Raises:
        WeightsFolderError: the file or the manifest is damaged. OSError: the file cannot be read.
    """
    data, checkpoint = file.read_bytes(), file.parents[1]
    if (checkpoint / MANIFEST).is_file():
        entry = manifest(checkpoint).get(f"{file.parent.name}/{file.name}")
        if entry and (len(data), zlib.crc32(data)) != (entry["bytes"], entry["crc32"]):
            raise WeightsFolderError(f"{file} is damaged: its bytes are not those that were written")
    return data
