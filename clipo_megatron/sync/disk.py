"""Weights to servers through a folder that trainer and servers share: safetensors, one file a bucket.

Every sender writes what it owns, with one bucket in memory. When all files are there, the coordinator adds an index and
what else a model folder has, and gives the folder its name, so that a folder of a version is whole or not there. Then
it has the servers read it, one version at a time; the folder of the version before goes when nobody needs it any more.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipo_megatron.sync.attempt import Attempt
from clipo_megatron.sync.checksums import Sums
from clipo_megatron.sync.served import Order, ServedSync

_VERSION = re.compile(r"v(\d+)(\.tmp)?")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")  # what the folder has of its own


class DiskSync(ServedSync):
    """Transport `disk`; see the module.

    Args:
        model: the model's Hugging Face folder, for config.json, the tokenizer and the like.
        folder: where versions are written; trainer and servers see it under the same path.
        args: as for `ServedSync`, and `kwargs` too.
    """

    def __init__(self, *args: Any, model: str | Path, folder: str | Path, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model, self.folder = Path(model), Path(folder).absolute()
        self._memory: Tensor | None = None

    def _begin(self, version: int) -> None:
        """Write the version's folder; what runs that broke off have left is removed."""
        draft = self.folder / f"v{version}.tmp"

        def prepare() -> None:
            if self.shard.is_coordinator:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove(keep=self._newest())  # servers may be reading that one
                draft.mkdir()

        def complete() -> None:
            if self.shard.is_coordinator:
                self._complete(draft, [each for part in written for each in part])
                target = self.folder / f"v{version}"
                shutil.rmtree(target, ignore_errors=True)  # of a run that has pushed this version before
                draft.rename(target)

        self._together(prepare, None, None)
        written = self._together(lambda: self._write(draft), None, None)
        self._together(complete, None, None)

    def _finish(self, version: int) -> None:
        if self.shard.is_coordinator:
            self._remove(keep=version)

    def _transfer(self, order: Order, attempt: Attempt | None) -> Sums | None:
        folder = str(self.folder / f"v{order.version}")
        sums: list[Sums | None] = [None]

        def hash_own() -> None:
            if order.verify and self.shard.takes_part:
                sums[0] = Sums(self.shard.spec, order.tp_sizes, order.kind)
                for bucket, flat in self.shard.own_buckets(self.plan, self._buffer):
                    sums[0].add(bucket, flat)
            self._memory = None

        async def load(attempt: Attempt) -> None:
            limit = self.limits.total_s / 2  # its one long call
            await attempt.each("pause", lambda each: each.server.pause(self.in_flight, deadline_s=attempt.deadline()))
            await attempt.each("load", lambda each: each.server.load_folder(folder, order.version, deadline_s=limit))

        self._together(hash_own, load, attempt)
        return sums[0]

    # --- files ---------------------------------------------------------------------------------------------------

    def _buffer(self, numel: int) -> Tensor:
        """One bucket, for every one in turn: each is written before the next is gathered."""
        if self._memory is None:
            size = self.shard.largest(self.plan)
            self._memory = torch.empty(size, dtype=self.plan.dtype, device=self.shard.device)
        return self._memory

    def _write(self, draft: Path) -> list[tuple[str, list[str], int]]:
        """This rank's files: name, tensors, bytes."""
        files: list[tuple[str, list[str], int]] = []
        if self.shard.takes_part:
            for bucket, flat in self.shard.own_buckets(self.plan, self._buffer):
                tensors = {name: tensor.cpu() for name, tensor in bucket.views(flat)}
                stage, experts = self.shard.sender
                name = f"model-{stage}-{experts}-{len(files):05d}.safetensors"
                save_file(tensors, draft / name, metadata={"format": "pt"})
                files.append((name, list(tensors), flat.nbytes))
        return files

    def _complete(self, draft: Path, files: list[tuple[str, list[str], int]]) -> None:
        """Make a model folder of the files."""
        index = {
            "metadata": {"total_size": sum(nbytes for _, _, nbytes in files)},
            "weight_map": {tensor: name for name, tensors, _ in files for tensor in tensors},
        }
        (draft / _INDEX).write_text(json.dumps(index))
        for file in sorted(self.model.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, draft / file.name)

    def _versions(self) -> list[tuple[int, bool, Path]]:
        """What stands in the folder: version, whether it is whole, path."""
        found = []
        for path in self.folder.iterdir():
            if match := _VERSION.fullmatch(path.name):
                found.append((int(match[1]), match[2] is None, path))
        return sorted(found)

    def _newest(self) -> int:
        """The version written last, by the clock: a run that goes on from a checkpoint counts anew. -1: none."""
        whole = [(path.stat().st_mtime, version) for version, whole, path in self._versions() if whole]
        return max(whole)[1] if whole else -1

    def _remove(self, keep: int) -> None:
        """Remove drafts, and whole versions but one."""
        for version, whole, path in self._versions():
            if not whole or version != keep:
                shutil.rmtree(path, ignore_errors=True)
