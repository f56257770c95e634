"""Which checkpoints are there, which of them are whole, and which stay."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipo_megatron.runtime.durable_files import crc32

MANIFEST = "manifest.json"
PICKLED = (".metadata", "common.pt")  # what is read whole, and runs as it is read


@dataclass(frozen=True)
class Retention:
    """What stays when a new checkpoint is complete."""

    keep: int = 0  # the newest so many; 0: all
    every: int = 0  # and those of steps that this divides; 0: none for that
    best: int = 0  # and so many with the best held-out accuracy

    def stays(self, steps: Sequence[int], accuracy: Mapping[int, float]) -> set[int]:
        """Of the steps with a complete checkpoint, those whose checkpoint stays.

        Args:
            steps: in any order.
            accuracy: held-out accuracy by step, as far as it was evaluated. Of equal ones the later is better.
        """
        if self.keep == 0:
            return set(steps)
        newest = sorted(steps)[-self.keep :]
        marks = [step for step in steps if self.every and step % self.every == 0]
        known = sorted((step for step in steps if step in accuracy), key=lambda step: (accuracy[step], step))
        return {*newest, *marks, *(known[-self.best :] if self.best else [])}


def name_of(step: int) -> str:
    """A checkpoint's folder."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Inverse of `name_of`."""
    return int(path.name.removeprefix("step_"))


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints of a run, whole or damaged."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def complete(folder: Path) -> list[Path]:
    """Checkpoints whose files are all there in their full size, oldest first."""
    return [path for path in reversed(newest_first(folder)) if not defect(path)]


def defect(path: Path) -> str:
    """What is missing of a checkpoint, as far as names and sizes tell; empty if nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} were written"
        return "" if path.name == name_of(manifest["step"]) else f"it holds step {manifest['step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def changed(path: Path, *, share: int = 0, shares: int = 1, names: Collection[str] | None = None) -> str:
    """The first file of one share of them whose bytes are not those that were written; empty if all are.

    Args:
        path: of the checkpoint.
        share: of so many `shares`.
        names: look at those of these names only, in whatever folder.
    """
    try:
        written = json.loads((path / MANIFEST).read_text())["files"]
        for name in sorted(written)[share::shares]:
            if names is not None and Path(name).name not in names:
                continue
            if crc32(path / name) != written[name]["crc32"]:
                return f"the bytes of {name} are not those that were written"
    except OSError as error:  # a disk that cannot read what it once wrote
        return f"{error.filename} cannot be read ({error.strerror})"
    return ""


def remove(path: Path) -> None:
    """Delete a checkpoint; out of sight first, so that no half of it is ever seen."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what was being written or deleted when a process died."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
