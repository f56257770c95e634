"""Which checkpoints exist, which of them are complete, and which stay."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipo_megatron.config.schema import CheckpointConfig
from clipo_megatron.runtime.manifest import ManifestError, read_manifest, size_defect
from clipo_megatron.runtime.run_dir import STEP_NAMES, step_name, step_of

PICKLED = (".metadata", "common.pt")  # files that are unpickled, whose bytes are compared first
_LEFTOVER = re.compile(r"\.step_\d+\.(partial|removed)")


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
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            if reason := size_defect(path / name, entry, shown=name):
                return reason
    except ManifestError as error:
        return error.reason
    step = manifest.get("step")
    return "" if step is not None and path.name == step_name(step) else f"it holds step {step}"


def remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that nobody ever sees half of it."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what was being written or deleted when a process died; all else stays, whatever its name begins with."""
    for leftover in folder.glob(f".{STEP_NAMES}"):
        if _LEFTOVER.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)
