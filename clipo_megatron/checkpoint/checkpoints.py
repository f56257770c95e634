"""Checkpoints: every state owner's state in one directory a step, complete or not there at all.

    checkpoints/step_000010/          written as .step_000010.partial, then renamed
        manifest.json                 step, facts of the run, size and CRC-32 of every file; written last
        policy/                       Megatron's torch_dist: parameters and optimizer, loadable in any layout
        hf/                           config.json, tokenizer and what else stood beside the model's first weights
        <owner>.safetensors, .json    tensors and plain values of each other owner

Owners' states are nested dicts of tensors and plain JSON values. Nothing is pickled by us. A checkpoint that was cut
short or changed on disk is recognised by its manifest and passed over for an older one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipo_megatron.config.model_folder import HF_FILES, POLICY
from clipo_megatron.files import crc32, sync, write_durably

MANIFEST = "manifest.json"


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


class Checkpoints:
    """The checkpoints of one run. All methods but `complete` are collective.

    Args:
        folder: of all checkpoints; made when the first is saved.
        owners: whose state is kept.
        save_policy: writes the policy's files into an empty folder.
        load_policy: reads them.
        keep: newest complete checkpoints that stay; 0 keeps all.
        facts: what a checkpoint and the run that resumes from it must agree on; "layout" may differ.
        say: takes one line of news; on rank 0.
        beside: files of a checkpoint's hf/, by name; on rank 0. With them it can be exported without the source.
    """

    def __init__(
        self,
        folder: Path,
        owners: Sequence[Owner],
        *,
        save_policy: Callable[[Path], None],
        load_policy: Callable[[Path], None],
        keep: int,
        facts: Mapping[str, Any],
        say: Callable[[str], None] = lambda line: None,
        beside: Mapping[str, bytes] | None = None,
    ):
        self.folder, self.owners, self.keep, self.facts, self.say = folder, list(owners), keep, dict(facts), say
        self.save_policy, self.load_policy = save_policy, load_policy
        self.beside = dict(beside or {})

    def save(self, step: int) -> Path:
        """Write the state after `step` steps, make it visible in one rename, then prune old ones.

        Raises:
            CheckpointError: it cannot be written; older checkpoints are as they were.
        """
        final = self.folder / f"step_{step:06d}"
        partial = self.folder / f".{final.name}.partial"
        with _writing(final):
            if _rank() == 0:
                self._sweep()
                (partial / POLICY).mkdir(parents=True)
                if self.beside:
                    (partial / HF_FILES).mkdir()
                for name, data in self.beside.items():
                    write_durably(partial / HF_FILES / name, data)
            _barrier()
            self.save_policy(partial / POLICY)
            for owner in self.owners:
                writes = owner.per_rank or owner.writes
                state = owner.state_dict() if writes or owner.gathers else {}
                if writes:
                    _write_tree(partial / self._file(owner), state)
            _barrier()
            manifest = {"step": step, "world": _world(), **self.facts, "files": _contents(partial)}
            if _rank() == 0:
                write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
                _remove(final)  # of this step, but damaged: a complete one would have been resumed from
                os.replace(partial, final)
                sync(self.folder)
                for old in self.complete()[: -self.keep] if self.keep > 0 else []:
                    _remove(old)
            _barrier()
        return final

    def complete(self) -> list[Path]:
        """Checkpoints whose files are all there in their full size, oldest first."""
        return [path for path in reversed(self._newest_first()) if not _defect(path)]

    def has(self, step: int) -> bool:
        """Whether the state after `step` steps is saved already."""
        return _from_rank_0(lambda: not _defect(self.folder / f"step_{step:06d}"))

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint, the same on every rank; None where there is none at all.

        Damaged ones are passed over with a word about each; what a killed process left half written is removed.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        if _rank() == 0:
            self._sweep()
        damaged = []
        for path in _from_rank_0(self._newest_first):
            defect = _from_rank_0(lambda path=path: _defect(path)) or _changed(path)
            if not defect:
                return path
            damaged.append(f"{path} is damaged: {defect}")
            self.say(f"warning: {damaged[-1]}; looking for an older checkpoint")
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is complete: {damaged[0]}. Restore the file, or start over with "
                "checkpoint.resume=false"
            )
        return None

    def load(self, path: Path) -> int:
        """Restore every owner.

        Returns:
            How many steps were done.

        Raises:
            CheckpointError: the checkpoint is of another model or algorithm, or an owner's state is missing.
        """
        manifest = json.loads((path / MANIFEST).read_text())
        for name, mine in self.facts.items():
            if name != "layout" and manifest.get(name) != mine:
                raise CheckpointError(
                    f"{path} was written with {name} = {_spell(manifest.get(name))}, and this run has {_spell(mine)}: "
                    "it cannot go on from there. Restore that setting, choose another train.output, or start over "
                    "with checkpoint.resume=false"
                )
        self.load_policy(path / POLICY)
        for owner in self.owners:
            if not owner.reads:
                continue
            file = path / self._file(owner)
            if not _tree_file(file).exists():
                if owner.optional or (owner.per_rank and manifest["world"] != _world()):
                    continue  # another number of ranks: a rank without a past keeps its fresh state
                raise CheckpointError(f"{path} has no state of {owner.name}: remove that folder to use an older one")
            owner.load_state_dict(_read_tree(file))
        _barrier()
        return int(manifest["step"])

    def _newest_first(self) -> list[Path]:
        steps = {
            int(path.name.removeprefix("step_")): path
            for path in self.folder.glob("step_*")
            if re.fullmatch(r"step_\d+", path.name) and path.is_dir()
        }
        return [steps[step] for step in sorted(steps, reverse=True)]

    def _sweep(self) -> None:
        """Remove what was being written or deleted when a process died."""
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @staticmethod
    def _file(owner: Owner) -> str:
        return f"{owner.name}.{_rank()}" if owner.per_rank else owner.name


def _defect(path: Path) -> str:
    """What is missing of a checkpoint, as far as names and sizes tell; empty if nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} were written"
        return "" if path.name == f"step_{manifest['step']:06d}" else f"it holds step {manifest['step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def _contents(folder: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file, by name; every rank reads its share of them. Collective.

    CRC-32 finds what disks and copies do to files (zlib's runs at some 4 GB/s); it is no defence against intent.
    """
    names = _from_rank_0(lambda: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    mine = {
        name: {"bytes": (folder / name).stat().st_size, "crc32": crc32(folder / name)}
        for name in names[_rank() :: _world()]
    }
    parts: list[dict[str, dict[str, int]]] = [{} for _ in range(_world())]
    dist.all_gather_object(parts, mine)
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def _changed(path: Path) -> str:
    """The first file whose bytes are not those that were written; empty if all are. Collective."""
    written = json.loads((path / MANIFEST).read_text())["files"]
    found = ""
    for name in sorted(written)[_rank() :: _world()]:
        if not found and crc32(path / name) != written[name]["crc32"]:
            found = f"the bytes of {name} are not those that were written"
    parts = [""] * _world()
    dist.all_gather_object(parts, found)
    return next(filter(None, parts), "")


def _remove(path: Path) -> None:
    """Delete a checkpoint; out of sight first, so that no half of it is ever seen."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}. Free space or correct train.output; the same command goes on from "
            "the checkpoint before"
        ) from error


def _spell(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return "nothing" if fact is None else str(fact)


def _tree_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _tensor_file(path: Path) -> Path:
    return path.with_name(path.name + ".safetensors")


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
        save_file(tensors, _tensor_file(path))
        sync(_tensor_file(path))
    write_durably(_tree_file(path), json.dumps(tree))


def _read_tree(path: Path) -> dict[str, Any]:
    tree = json.loads(_tree_file(path).read_text())
    file = _tensor_file(path)
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


def _rank() -> int:
    return dist.get_rank()


def _world() -> int:
    return dist.get_world_size()


def _from_rank_0(ask: Callable[[], Any]) -> Any:
    """Rank 0's answer, on every rank: file systems show ranks different things at times."""
    box = [ask() if _rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _barrier() -> None:
    dist.all_reduce(torch.zeros(1))
