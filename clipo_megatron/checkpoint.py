"""Checkpoints: every state owner's state in one directory a step, complete or not there at all.

    checkpoints/step_000010/          written as .step_000010.partial, then renamed
        manifest.json                 step, layout, and the size of every file; written last
        policy/                       Megatron's torch_dist: parameters and optimizer, loadable in any layout
        <owner>.safetensors, .json    tensors and plain values of each other owner

Owners' states are nested dicts of tensors and plain JSON values. Nothing is pickled by us.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names file and remedy."""


@dataclass(frozen=True)
class Owner:
    """Somebody with state. `save(folder)` and `load(folder)` are for owners that write files of their own."""

    name: str
    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], None]
    writes: bool = True  # whether this rank writes it: exactly one rank does
    reads: bool = True  # whether this rank takes part in loading it
    per_rank: bool = False  # every rank has its own, in <name>.<rank>


class Checkpoints:
    """The checkpoints of one run. All methods are collective."""

    def __init__(
        self,
        folder: Path,
        owners: list[Owner],
        *,
        save_policy: Callable[[Path], None],
        load_policy: Callable[[Path], None],
        keep: int,
        facts: Mapping[str, Any],
    ):
        self.folder, self.owners, self.keep, self.facts = folder, owners, keep, dict(facts)
        self.save_policy, self.load_policy = save_policy, load_policy

    def save(self, step: int) -> Path:
        """Write the state after `step` steps, make it visible in one rename, then prune old ones."""
        final = self.folder / f"step_{step:06d}"
        partial = self.folder / f".{final.name}.partial"
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "policy").mkdir(parents=True)
        _barrier()
        self.save_policy(partial / "policy")
        for owner in self.owners:
            if owner.per_rank or owner.writes:
                _write_tree(partial / self._file(owner), owner.state_dict())
        _barrier()
        if _rank() == 0:
            files = {
                str(path.relative_to(partial)): path.stat().st_size
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            manifest = {"step": step, "world": _world(), **self.facts, "files": files}
            _write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _sync_folder(self.folder)
            for old in self.complete()[: -self.keep] if self.keep > 0 else []:
                shutil.rmtree(old, ignore_errors=True)
        _barrier()
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [path for path in sorted(self.folder.glob("step_*")) if _is_complete(path)]

    def has(self, step: int) -> bool:
        """Whether the state after `step` steps is saved already; collective."""
        newest = self.latest()
        return newest is not None and newest.name == f"step_{step:06d}"

    def latest(self) -> Path | None:
        """The newest complete one, the same on every rank."""
        box = [str(found[-1]) if (found := self.complete()) else None] if _rank() == 0 else [None]
        dist.broadcast_object_list(box, src=0)
        return Path(box[0]) if box[0] else None

    def load(self, path: Path) -> int:
        """Restore every owner.

        Returns:
            How many steps were done.

        Raises:
            CheckpointError: the checkpoint is of another model, or an owner's state is missing.
        """
        manifest = json.loads((path / MANIFEST).read_text())
        for name, mine in self.facts.items():
            if name in manifest and manifest[name] != mine and name != "layout":
                raise CheckpointError(
                    f"{path} was written with {name} = {manifest[name]!r}, this run has {mine!r}: choose another "
                    "train.output, or checkpoint.resume=false to start over"
                )
        self.load_policy(path / "policy")
        for owner in self.owners:
            if not owner.reads:
                continue
            file = path / self._file(owner)
            if not file.with_suffix(file.suffix + ".json").exists():
                if owner.per_rank and manifest["world"] != _world():
                    continue  # another number of ranks: a rank without a past keeps its fresh state
                raise CheckpointError(f"{path} has no state of {owner.name}; remove that folder to use an older one")
            owner.load_state_dict(_read_tree(file))
        _barrier()
        return int(manifest["step"])

    @staticmethod
    def _file(owner: Owner) -> str:
        return f"{owner.name}.{_rank()}" if owner.per_rank else owner.name


def _is_complete(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return all((path / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _write_tree(path: Path, state: Mapping[str, Any]) -> None:
    """Tensors to <path>.safetensors, the rest to <path>.json, where {"__tensor__": key} stands for a tensor."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous()
            return {"__tensor__": key}
        if isinstance(value, Mapping):
            return {"__dict__": [[name, strip(item, f"{key}.{name}")] for name, item in value.items()]}
        if isinstance(value, list | tuple):
            return [strip(item, f"{key}.{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(f"state {key} is a {type(value).__name__}; owners keep tensors and plain values only")

    tree = strip(state, "")
    if tensors:
        save_file(tensors, path.with_suffix(path.suffix + ".safetensors"))
    _write_text(path.with_suffix(path.suffix + ".json"), json.dumps(tree))


def _read_tree(path: Path) -> dict[str, Any]:
    tree = json.loads(path.with_suffix(path.suffix + ".json").read_text())
    file = path.with_suffix(path.suffix + ".safetensors")
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


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return dist.get_rank()


def _world() -> int:
    return dist.get_world_size()


def _barrier() -> None:
    dist.all_reduce(torch.zeros(1))
