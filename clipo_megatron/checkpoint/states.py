"""The parts of a run that have state, and snapshots of their states on the way to files and back.

States are nested dicts and lists of tensors and plain JSON values. This package pickles nothing of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from clipo_megatron.runtime.durable_files import FolderWriter


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and the remedy."""


class Stateful(Protocol):
    """Has a state of nested dicts and lists of tensors and plain JSON values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class CheckpointItem:
    """A stateful part of the run, and which ranks write it."""

    name: str
    stateful: Stateful
    writes: bool = True  # whether this rank writes it: exactly one rank does
    per_rank: bool = False  # every rank has its own state, in <name>.<rank>
    gathers: bool = False  # `state_dict` is collective: all ranks call it, and the writing rank gets the whole state
    optional: bool = False  # may be absent: older checkpoints do not have it

    def stem(self, rank: int) -> str:
        """The name of its files without the suffix."""
        return f"{self.name}.{rank}" if self.per_rank else self.name


class ModelSnapshot(Protocol):
    """A rank's part of a model's state at one moment. Any thread may write it; no method is collective."""

    def copy(self) -> None:
        """Copy to host memory what training may change, which waits until this is done.

        It is not called for a snapshot that is written at once.
        """

    def write(self, files: FolderWriter) -> Any:
        """Write this rank's files, and return what `finish` has to know of them; it must be picklable."""

    def finish(self, files: FolderWriter, written: Sequence[Any]) -> None:
        """On rank 0, after all ranks have written: add files that need what each rank's `write` returned."""


class ModelCheckpointer(Protocol):
    """Takes snapshots of a model and its optimizer, and loads their files."""

    def take(self) -> ModelSnapshot: ...

    def load(self, folder: Path) -> None: ...


@dataclass
class CheckpointContents:
    """Everything that the checkpoints of a run hold."""

    items: Sequence[CheckpointItem] = ()
    models: Mapping[str, ModelCheckpointer] = field(default_factory=dict)  # by folder: "policy", "critic"
    facts: Mapping[str, Any] = field(default_factory=dict)  # must be equal in the run that resumes; "layout" may differ
    sidecar_files: Mapping[str, bytes] = field(default_factory=dict)  # files of hf/, by name; on rank 0


@dataclass(frozen=True, slots=True)
class ItemSnapshot:
    """The state of an item at one moment, independent of what the item does later."""

    stem: str
    tree: str  # JSON, where {"__tensor__": key} stands for a tensor
    tensors: dict[str, Tensor]

    def write(self, files: FolderWriter) -> None:
        """Write the tensors to <stem>.safetensors, and the rest to <stem>.json."""
        if self.tensors:
            files.write(f"{self.stem}.safetensors", serialized(self.tensors))
        files.write(f"{self.stem}.json", self.tree)


def take_snapshot(stem: str, state: Mapping[str, Any]) -> ItemSnapshot:
    """Copy a state.

    Raises:
        CheckpointError: it holds something other than tensors and plain values.
    """
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            held = value.detach()
            tensors[key] = (held.clone() if held.device.type == "cpu" else held.cpu()).contiguous()
            return {"__tensor__": key}
        if isinstance(value, Mapping):
            return {"__dict__": [[name, strip(item, f"{key}.{name}")] for name, item in value.items()]}
        if isinstance(value, list | tuple):
            return [strip(item, f"{key}.{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(f"state {key} is a {type(value).__name__}; keep tensors and plain values only")

    return ItemSnapshot(stem, json.dumps(strip(state, "")), tensors)


def has_state(folder: Path, stem: str) -> bool:
    """Whether a checkpoint has the state of an item."""
    return (folder / f"{stem}.json").exists()


def read_state(folder: Path, stem: str) -> dict[str, Any]:
    """Read a state that `ItemSnapshot.write` has written, with its tensors on the CPU."""
    tree = json.loads((folder / f"{stem}.json").read_text())
    file = folder / f"{stem}.safetensors"
    tensors = load_file(file) if file.exists() else {}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            return {name: fill(item) for name, item in value["__dict__"]}
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value

    return fill(tree)
