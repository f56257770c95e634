"""Files with pooled hidden states and embeddings of some rollouts of a step. Imports no torch."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clipo_megatron.runtime.durable_files import refuse_unreadable
from clipo_megatron.runtime.run_dir import STEP_NAMES, step_name

_MOST_BYTES = 1 << 32  # of a file; the usual 256 rollouts of a large model take some millions
PATTERN = f"{STEP_NAMES}.safetensors"


@dataclass(frozen=True)
class States:
    """States of n rollouts of one step: whole groups, in the order of the step's table."""

    step: int
    prompt_ids: list[str]  # one per group
    group: NDArray[np.int64]  # [n], index into prompt_ids
    correct: NDArray[np.bool_]  # [n]
    graded: NDArray[np.bool_]  # [n]
    pooled: NDArray[np.float32]  # [n, H], mean hidden state over the response
    embeddings: NDArray[np.float32] | None = (
        None  # [n, d], from the contrastive head before its update; None without one
    )
    bonus: NDArray[np.float32] | None = None  # [n], the contrastive part of the reward


def chosen(groups: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The rows of the first whole groups: at most `most` rows, but at least one group.

    Args:
        groups: [B], the group of each row, ascending.
        most: maximum number of rows.
    """
    ends = np.flatnonzero(np.append(groups[1:] != groups[:-1], True)) + 1
    fitting = ends[ends <= most]
    return np.arange(fitting[-1] if len(fitting) else ends[0])


def file_of(folder: Path, step: int) -> Path:
    """The file with the states of a step."""
    return folder / f"{step_name(step)}.safetensors"


def write_states(folder: Path, states: States) -> None:
    """Write the states of a step completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        name: np.ascontiguousarray(value)
        for name in ("group", "correct", "graded", "pooled", "embeddings", "bonus")
        if (value := getattr(states, name)) is not None
    }
    metadata = {"step": str(states.step), "prompt_ids": json.dumps(states.prompt_ids)}
    file = file_of(folder, states.step)
    partial = file.with_name(f"{file.name}.tmp")
    partial.write_bytes(save(columns, metadata))
    os.replace(partial, file)


def read_states(file: Path) -> States:
    """Inverse of `write_states`.

    Raises:
        ValueError: the file does not hold states; the message names it.
    """
    try:
        refuse_unreadable(file)
        if (size := file.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"it has {size} bytes")
        data = file.read_bytes()
        columns = load(data)
        metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
        states = States(step=int(metadata["step"]), prompt_ids=json.loads(metadata["prompt_ids"]), **columns)
        _refuse_misfit(states)
        return states
    except (OSError, SafetensorError, struct.error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} does not hold the states of a step: {error}") from error


def _refuse_misfit(states: States) -> None:
    """Raise ValueError for columns whose types or lengths do not fit each other."""
    rows, kinds = len(states.group), {"group": "iu", "correct": "b", "graded": "b", "pooled": "f"}
    for name, kind in {**kinds, "embeddings": "f", "bonus": "f"}.items():
        values, dimensions = getattr(states, name), 2 if name in ("pooled", "embeddings") else 1
        if values is None and name not in kinds:
            continue
        if values.dtype.kind not in kind or values.ndim != dimensions or len(values) != rows:
            raise ValueError(f"{name} is {values.dtype} of shape {values.shape}, with {rows} rows in group")
        if kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite")
    ids = states.prompt_ids
    if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
        raise ValueError("prompt_ids is no list of names")
    if rows and not 0 <= states.group.min() <= states.group.max() < len(ids):
        raise ValueError(f"group names a prompt beyond the {len(ids)} of prompt_ids")


def steps_with_states(folder: Path) -> list[int]:
    """The steps whose states were recorded, ascending."""
    names = (path.stem.partition("_")[2] for path in folder.glob(PATTERN))
    return sorted(int(name) for name in names if name.isdigit())


def forget_states(folder: Path, *, from_step: int) -> None:
    """Remove the states of `from_step` and later steps, which a resumed run repeats."""
    for step in steps_with_states(folder):
        if step >= from_step:
            file_of(folder, step).unlink()


class StateWriter:
    """Writes states in a thread, one step at a time. A failure is only a warning: the run does not need them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._thread: threading.Thread | None = None

    def write(self, states: States) -> None:
        """Begin to write the states of a step, after those of the step before have been written."""
        self.close()
        self._thread = threading.Thread(target=self._write, args=(states,), name="states", daemon=True)
        self._thread.start()

    def _write(self, states: States) -> None:
        try:
            write_states(self.folder, states)
        except OSError as error:
            print(f"clipo: warning: {self.folder} cannot be written: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wait until the last states are written. Idempotent."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
