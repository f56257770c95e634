"""Weights to servers through a shared folder of safetensors, one file for each bucket.

Every sender writes its own buckets, with one of them in memory. When all files are written, the coordinator adds an
index and the model's sidecar files and renames the folder, so that a version's folder is complete or absent. Then the
servers load it. The folder of the previous version is removed after the update.

All versions of a run lie in a folder that the run has made, below the one that the user named: nothing else is removed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipo_megatron.rollout.engine import EngineError
from clipo_megatron.rollout.servers.hf_folder import copy_sidecar_files
from clipo_megatron.rollout.servers.server import LiveServer
from clipo_megatron.sync.attempt import Attempt
from clipo_megatron.sync.checksums import Sums, sums_of_shard
from clipo_megatron.sync.consensus import share
from clipo_megatron.sync.served import AttemptPlan, ServedSync

_VERSION = re.compile(r"v(\d+)(\.tmp)?")
_MARKER = ".written-by-a-run"
_INDEX = "model.safetensors.index.json"


class DiskSync(ServedSync):
    """The transport `disk`, which the module describes.

    Args:
        model: the model's Hugging Face folder, whose sidecar files are copied.
        folder: where the run's own folder is made; trainer and servers see it under the same path.
        run: the run's output folder, by which its own folder is told from those of other runs.
        args: positional arguments of `ServedSync`.
        kwargs: keyword arguments of `ServedSync`.
    """

    def __init__(self, *args: Any, model: str | Path, folder: str | Path, run: str | Path, **kwargs: Any):
        super().__init__(*args, **kwargs)
        name = blake2b(str(Path(run).absolute()).encode(), digest_size=4).hexdigest()
        self.model, self.folder = Path(model), Path(folder).absolute() / f"clipo-{name}"
        self._memory: Tensor | None = None
        self._changes = False  # whether the folder of this update holds changes alone

    def _unfit(self, target: LiveServer) -> str:
        return ""

    def _begin(self, version: int) -> None:
        """Write the version's folder: changes alone, if it seems that all servers hold what was sent last."""
        changes = self.config.delta and share(lambda: self._formed is not None)
        if not self._write_folder(version, changes):
            self._write_folder(version, False)

    def _write_folder(self, version: int, changes: bool) -> bool:
        """Write the version's folder, and remove what interrupted runs have left; False if there is nothing to write.
        Collective."""
        draft = self.folder / f"v{version}.tmp"
        self._changes = changes

        def prepare() -> None:
            if self.shard.is_coordinator:
                self._claim()
                self._remove(keep=self._newest())  # servers may be loading it
                draft.mkdir()

        def complete() -> None:
            if self.shard.is_coordinator:
                self._complete(draft, [each for part in written for each in part])
                target = self.folder / f"v{version}"
                shutil.rmtree(target, ignore_errors=True)  # written by an earlier run
                draft.rename(target)

        self._run_phase(prepare, None, None)
        written = self._run_phase(lambda: self._write(draft), None, None)
        if not share(lambda: any(written)):
            return False
        self._run_phase(complete, None, None)
        return True

    def _finish(self, version: int) -> None:
        if self.shard.is_coordinator:
            self._remove(keep=version)

    def _transfer(self, plan: AttemptPlan, attempt: Attempt | None) -> Sums | None:
        folder = str(self.folder / f"v{plan.version}")
        sums: list[Sums | None] = [None]
        self._memory = None
        if self._changes and not plan.changes:  # a server has joined
            self._write_folder(plan.version, False)

        def hash_own() -> None:
            if plan.verify and self.shard.takes_part:
                sums[0] = sums_of_shard(self.shard, self.export_plan, plan.tp_sizes, plan.kind)

        async def load(attempt: Attempt) -> None:
            limit = self.deadlines.total_s / 2  # loading is the one long call of the attempt
            await self._pause(attempt, self._changes)
            facts = {"changes": self._changes, "deadline_s": limit}
            await attempt.each("load", lambda each: each.server.load_folder(folder, plan.version, **facts))

        self._run_phase(hash_own, load, attempt)
        return sums[0]

    # --- files ---------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Make the run's own folder, and mark it.

        Raises:
            EngineError: a folder of this name is there, and no run has made it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / _MARKER
        if not marker.is_file():
            if any(self.folder.iterdir()):
                raise EngineError(
                    f"{self.folder} holds files that no run has written there. Move them away, or choose another "
                    "rollout.sync.folder."
                )
            marker.write_text("The run removes what it has written here.\n")

    def _buffer(self, numel: int) -> Tensor:
        """The memory of one bucket, which every bucket reuses: each is written before the next is gathered."""
        if self._memory is None:
            size = self.shard.largest(self.export_plan)
            self._memory = torch.empty(size, dtype=self.export_plan.dtype, device=self.shard.device)
        return self._memory

    def _write(self, draft: Path) -> list[tuple[str, list[str], int]]:
        """Write this rank's buckets; returns the name, tensor names and bytes of each file."""
        files: list[tuple[str, list[str], int]] = []
        for tensors in self._tensors() if self.shard.takes_part else ():
            stage, experts = self.shard.sender
            name = f"model-{stage}-{experts}-{len(files):05d}.safetensors"
            save_file(tensors, draft / name, metadata={"format": "pt"})
            files.append((name, list(tensors), sum(tensor.nbytes for tensor in tensors.values())))
        return files

    def _tensors(self) -> Iterator[dict[str, Tensor]]:
        """What this rank writes, in host memory, one bucket after the other."""
        if self._changes:
            for changed in self._last_sent.changes(self.shard.chunks()):
                if changed:
                    yield {name: tensor.cpu() for name, tensor in changed}
            return
        for bucket, flat in self.shard.own_buckets(self.export_plan, self._buffer):
            yield {name: tensor.cpu() for name, tensor in bucket.views(flat)}
        if self.config.delta:
            self._last_sent.remember(self.shard.chunks())

    def _complete(self, draft: Path, files: list[tuple[str, list[str], int]]) -> None:
        """Add the index of the files, and the sidecar files."""
        index = {
            "metadata": {"total_size": sum(nbytes for _, _, nbytes in files)},
            "weight_map": {tensor: name for name, tensors, _ in files for tensor in tensors},
        }
        self._state.sent = index["metadata"]["total_size"]
        (draft / _INDEX).write_text(json.dumps(index))
        copy_sidecar_files(self.model, draft)

    def _versions(self) -> list[tuple[int, bool, Path]]:
        """The folders of versions: version, whether the folder is complete, path."""
        found = []
        for path in self.folder.iterdir():
            if match := _VERSION.fullmatch(path.name):
                found.append((int(match[1]), match[2] is None, path))
        return sorted(found)

    def _newest(self) -> int:
        """The version that was written last, by the clock, because a resumed run counts versions anew; -1 if none."""
        complete = [(path.stat().st_mtime, version) for version, complete, path in self._versions() if complete]
        return max(complete)[1] if complete else -1

    def _remove(self, keep: int) -> None:
        """Remove incomplete folders, and complete ones of other versions."""
        for version, complete, path in self._versions():
            if not complete or version != keep:
                shutil.rmtree(path, ignore_errors=True)
