"""A checkpoint's manifest: size and CRC-32 of every file in it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from clipo_megatron.runtime.durable_files import crc32
from clipo_megatron.weights.errors import WeightsFolderError

MANIFEST = "manifest.json"


def manifest_defects(path: str | Path, *, contents: bool = True) -> list[str]:
    """What a checkpoint's files are not as its manifest says, a sentence each; [] for a sound checkpoint.

    Args:
        path: the checkpoint.
        contents: compare the bytes, by CRC-32; else only names and sizes.
    """
    folder = Path(path)
    try:
        written = manifest(folder)
    except WeightsFolderError as error:
        return [str(error)]
    return [defect for name, entry in written.items() if (defect := _defect(folder / name, entry, contents))]


def manifest(folder: Path) -> Mapping[str, Mapping[str, int]]:
    """Size ("bytes") and "crc32" of every file of a checkpoint, by name.

    Raises:
        CheckpointError: it has no manifest, so it is no complete checkpoint, or the manifest is damaged.
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
    """A file of a checkpoint's policy/, compared with the manifest beside that folder, if there is one.

    For pickles: what one does when it is loaded must be what was written.

    Raises:
        CheckpointError: the file or the manifest is damaged. OSError: it cannot be read.
    """
    data, checkpoint = file.read_bytes(), file.parents[1]
    if (checkpoint / MANIFEST).is_file():
        entry = manifest(checkpoint).get(f"{file.parent.name}/{file.name}")
        if entry and (len(data), zlib.crc32(data)) != (entry["bytes"], entry["crc32"]):
            raise WeightsFolderError(f"{file} is damaged: its bytes are not those that were written")
    return data
