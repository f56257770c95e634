"""Owners of state, and their states on their way to files and back.

States are nested dicts and lists of tensors and plain JSON values. Nothing is pickled by us.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from safetensors.torch import save as saved
from torch import Tensor

from clipo_megatron.runtime.durable_files import FolderWriter


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names file and remedy."""


@dataclass(frozen=True)
class Owner:
    """Somebody with state: nested dicts and lists of tensors and plain JSON values."""

    name: str
    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], None]
    writes: bool = True  # whether this rank writes it: exactly one rank does
    reads: bool = True  # whether this rank takes part in loading it
    per_rank: bool = False  # every rank has its own, in <name>.<rank>
    gathers: bool = False  # `state_dict` is collective: every rank calls it, and the one that writes gets the whole
    optional: bool = False  # a checkpoint without it is complete: it was written before there was such an owner

    def file(self, rank: int) -> str:
        """Name of its files, without what follows the last dot."""
        return f"{self.name}.{rank}" if self.per_rank else self.name


class PolicyState(Protocol):
    """A rank's part of the policy's state as it was taken. Any thread may write it; nothing here is collective."""

    def copy(self) -> None:
        """Copy what training may change, which waits for that. Not called for what is written at once."""

    def write(self, files: FolderWriter) -> Any:
        """Write this rank's files; returns what `finish` wants to know of them, to be pickled."""

    def finish(self, files: FolderWriter, written: Sequence[Any]) -> None:
        """On rank 0, when all ranks have written: what each of them returned, by rank."""


@dataclass(frozen=True, slots=True)
class Taken:
    """An owner's state of one moment: what its owner does from now on does not change it."""

    file: str
    tree: str  # JSON, where {"__tensor__": key} stands for a tensor
    tensors: dict[str, Tensor]

    def write(self, files: FolderWriter) -> None:
        """Tensors to <file>.safetensors, the rest to <file>.json."""
        if self.tensors:
            files.write(f"{self.file}.safetensors", saved(self.tensors))
        files.write(f"{self.file}.json", self.tree)


def take(file: str, state: Mapping[str, Any]) -> Taken:
    """Copy a state.

    Raises:
        CheckpointError: there is something in it that is neither tensor nor plain.
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
        raise CheckpointError(f"state {key} is a {type(value).__name__}; owners keep tensors and plain values only")

    return Taken(file, json.dumps(strip(state, "")), tensors)


def exists(folder: Path, file: str) -> bool:
    """Whether a checkpoint has that owner's state."""
    return (folder / f"{file}.json").exists()


def read(folder: Path, file: str) -> dict[str, Any]:
    """Inverse of `Taken.write`."""
    tree = json.loads((folder / f"{file}.json").read_text())
    place = folder / f"{file}.safetensors"
    tensors = load_file(place) if place.exists() else {}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            return {name: fill(item) for name, item in value["__dict__"]}
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value

    return fill(tree)
