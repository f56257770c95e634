"""Which checkpoints exist, which of them are complete, and which stay."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from clipo_megatron.config.schema import CheckpointConfig
from clipo_megatron.runtime.durable_files import crc32
from clipo_megatron.runtime.run_dir import STEP_NAMES, step_name, step_of

MANIFEST = "manifest.json"
PICKLED = (".metadata", "common.pt")  # files that are unpickled, which runs what they hold


def retained(steps: Sequence[int], accuracy: Mapping[int, float], settings: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints stay: the newest `keep`, the multiples of `keep_every` and the `keep_best` best ones.

    Args:
        steps: those with a complete checkpoint, in any order.
        accuracy: held-out accuracy by step, where it was evaluated. Of equal ones the later is better.
        settings: with `keep` = 0, all stay.
    """
    if settings.keep == 0:
        return set(steps)
    newest = sorted(steps)[-settings.keep :]
    multiples = [step for step in steps if settings.keep_every and step % settings.keep_every == 0]
    ranked = sorted((step for step in steps if step in accuracy), key=lambda step: (accuracy[step], step))
    return {*newest, *multiples, *(ranked[-settings.keep_best :] if settings.keep_best else [])}


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints of a run, damaged ones too."""
    found = [path for path in folder.glob(STEP_NAMES) if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def complete(folder: Path) -> list[Path]:
    """Checkpoints whose files are all there in their full size, oldest first."""
    return [path for path in reversed(newest_first(folder)) if not defect(path)]


def defect(path: Path) -> str:
    """What is wrong with a checkpoint as far as names and sizes tell; empty if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} were written"
        return "" if path.name == step_name(manifest["step"]) else f"it holds step {manifest['step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def changed(path: Path, *, share: int = 0, shares: int = 1, names: Collection[str] | None = None) -> str:
    """The first file whose checksum is not the manifest's, in words; empty if there is none.

    Args:
        path: the checkpoint's folder.
        share: which part of the files to read, when as many ranks as `shares` divide them.
        shares: number of parts.
        names: read only files with these names, in any folder.
    """
    try:
        written = json.loads((path / MANIFEST).read_text())["files"]
        for name in sorted(written)[share::shares]:
            if names is not None and Path(name).name not in names:
                continue
            if crc32(path / name) != written[name]["crc32"]:
                return f"the bytes of {name} are not those that were written"
    except OSError as error:  # a disk that fails to read what it once wrote
        return f"{error.filename} cannot be read ({error.strerror})"
    return ""


def remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that nobody ever sees half of it."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what was being written or deleted when a process died."""
    for leftover in folder.glob(f".{STEP_NAMES}"):
        shutil.rmtree(leftover, ignore_errors=True)
