"""The manifest of a checkpoint: version of its format, facts of its run, size and CRC-32 of each of its files.

It may come from anybody: each field is judged before it is used, and names lead to files of the checkpoint only.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from clipo_megatron.config.errors import spell
from clipo_megatron.runtime.durable_files import crc32, text_of

MANIFEST = "manifest.json"
FORMAT = 1  # raised when an older release could not read what is written any more; a manifest without it counts as 1
_FIELDS = {"format": 1, "step": 0, "world": 1}  # the least value of each whole number
_FACTS = ("model", "critic", "contrastive head", "layout")  # mappings, where there are any
_LONGEST_NAME = 255  # bytes of a part of a path
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class ManifestError(ValueError):
    """A checkpoint has no manifest, or one that contradicts itself or its files; `reason` does not name the folder."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(f"{folder} is no complete checkpoint: {reason}")
        self.reason = reason


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint; "files" has "bytes" and "crc32" of each file by name.

    Raises:
        ManifestError: there is none, a field is wrong, or a later version wrote it.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(text_of(path))
    except FileNotFoundError:
        raise ManifestError(folder, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(folder, f"{MANIFEST} cannot be read ({reason})") from None
    if reason := _defect_of_fields(found):
        raise ManifestError(folder, f"{MANIFEST} {reason}")
    return found


def manifest_defects(folder: Path, *, contents: bool = True) -> list[str]:
    """Compare a checkpoint's files with its manifest; return a sentence for each defect.

    Args:
        folder: the checkpoint.
        contents: whether to compare the bytes too, by CRC-32, and not only names and sizes.
    """
    try:
        written = read_manifest(folder)["files"]
    except ManifestError as error:
        return [str(error)]
    found = []
    for name, entry in written.items():
        path = folder / name
        reason = size_defect(path, entry, shown=path)
        if contents and not reason:
            reason = _content_defect(path, entry, shown=path)
        found += [reason] if reason else []
    return found


def changed_file(folder: Path, *, share: int = 0, shares: int = 1, names: Collection[str] | None = None) -> str:
    """The first file whose checksum is not the manifest's, in words; empty if there is none.

    Args:
        folder: the checkpoint.
        share: which part of the files to read, when as many ranks as `shares` divide them.
        shares: number of parts.
        names: read only files with these names, in any folder.
    """
    try:
        written = read_manifest(folder)["files"]
        for name in sorted(written)[share::shares]:
            if names is not None and Path(name).name not in names:
                continue
            if reason := _content_defect(folder / name, written[name], shown=name):
                return reason
    except ManifestError as error:
        return error.reason
    return ""


def read_checked(file: Path) -> bytes:
    """Read a file of a folder of a checkpoint, and compare it with the manifest if there is one.

    For pickles, which must not be loaded when they were changed.

    Raises:
        ManifestError: the file or the manifest is damaged. OSError: the file cannot be read.
    """
    checkpoint = file.parents[1]
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file")
    data = file.read_bytes()
    if (checkpoint / MANIFEST).is_file():
        name = f"{file.parent.name}/{file.name}"
        entry = read_manifest(checkpoint)["files"].get(name)
        if entry and (len(data), zlib.crc32(data)) != (entry["bytes"], entry["crc32"]):
            raise ManifestError(checkpoint, f"{name} is damaged: its bytes are not those that were written")
    return data


def size_defect(file: Path, entry: Mapping[str, int], *, shown: Path | str) -> str:
    """What is wrong with a listed file as far as its size tells, in words that call it `shown`; "" if nothing is."""
    try:
        if not file.is_file():
            return f"{shown} is missing"
        if (size := file.stat().st_size) != entry["bytes"]:
            return f"{shown} has {size} bytes, {entry['bytes']} were written"
    except OSError as error:
        return f"{shown} cannot be read ({error.strerror})"
    return ""


def _content_defect(file: Path, entry: Mapping[str, int], *, shown: Path | str) -> str:
    """The same of its bytes."""
    try:
        return "" if crc32(file) == entry["crc32"] else f"the bytes of {shown} are not those that were written"
    except OSError as error:  # a disk that fails to read what it once wrote
        return f"{shown} cannot be read ({error.strerror})"


def _defect_of_fields(found: Any) -> str:
    """Say which field is wrong and why, behind the file's name; "" if none is."""
    if not isinstance(found, Mapping):
        return f"holds a {type(found).__name__} and no fields"
    for field, least in _FIELDS.items():
        if field in found and not _is_number(found[field], least):
            return f"has {field} = {spell(found[field])}, and a whole number of {least} or more is needed"
    if (version := found.get("format", 1)) > FORMAT:
        return (
            f"has format = {version}, and this release reads checkpoints up to format {FORMAT}. Use the release of "
            "clipo-megatron that wrote it, or a newer one"
        )
    for field in _FACTS:
        if not isinstance(found.get(field), Mapping | None):
            return f"has {field} = {spell(found[field])}, and a mapping is needed"
    files = found.get("files")
    if not isinstance(files, Mapping):
        return f"has files = {spell(files)}, and a mapping of names is needed"
    for name, entry in files.items():
        if not _stays_inside(name):
            return f"has a name in files that is none of a file in the checkpoint: {spell(name)}"
        for field, most in (("bytes", None), ("crc32", 2**32 - 1)):
            value = entry.get(field) if isinstance(entry, Mapping) else None
            if not _is_number(value, 0, most):
                return f"has {field} = {spell(value)} for {spell(name)} in files, and a whole number is needed"
    return ""


def _is_number(value: Any, least: int, most: int | None = None) -> bool:
    return type(value) is int and least <= value and (most is None or value <= most)


def _stays_inside(name: str) -> bool:
    """Whether a name is a relative path of ordinary parts."""
    parts = PurePosixPath(name).parts
    ordinary = bool(parts) and not _NO_NAME.search(name) and ".." not in parts and not name.startswith("/")
    return ordinary and all(len(part.encode()) <= _LONGEST_NAME for part in parts)
