"""Writes one checkpoint: a snapshot goes to files with checksums, is forced to disk and renamed.

Every rank writes its own files. The ranks synchronise four times: when the snapshot is copied, when the folder exists,
when all have written, and when rank 0 has renamed it. They do so in a process group of their own, which a thread can
use while training communicates.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clipo_megatron.checkpoint.retention import complete, remove, retained, sweep
from clipo_megatron.checkpoint.states import ItemSnapshot, ModelSnapshot
from clipo_megatron.config.model_folder import HF_FILES
from clipo_megatron.config.schema import CheckpointConfig
from clipo_megatron.runtime.durable_files import FolderWriter, sync, sync_tree
from clipo_megatron.runtime.manifest import FORMAT, MANIFEST
from clipo_megatron.runtime.run_dir import step_name, step_of


@dataclass
class CheckpointSnapshot:
    """A rank's part of the run's state at one moment."""

    step: int
    facts: Mapping[str, Any]
    items: Sequence[ItemSnapshot]
    models: Mapping[str, ModelSnapshot]  # by folder
    sidecar_files: Mapping[str, bytes]
    accuracy: Mapping[int, float] = field(default_factory=dict)  # held-out accuracy by step


class CheckpointWriter:
    """Writes a checkpoint; every rank has one. The outcome is known when `thread` has ended or `run` has returned.

    Args:
        folder: holds all checkpoints of the run.
        snapshot: this rank's.
        settings: which other checkpoints stay; with `asynchronous` the models are copied before they are written,
            because training continues.
        group: a process group for this purpose alone; None with a single rank.

    Attributes:
        taken: set when training may change the state again.
        error: why there is no checkpoint, the same on every rank; empty if there is one.
        cause: the exception behind it, on the rank where it was raised.
        notes: on rank 0, what went wrong without harming this checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        snapshot: CheckpointSnapshot,
        settings: CheckpointConfig,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.folder, self.snapshot, self.settings, self.group = folder, snapshot, settings, group
        self._copies, self.taken = settings.asynchronous, threading.Event()
        self.final = folder / step_name(snapshot.step)
        self.partial = folder / f".{self.final.name}.partial"
        self.error = ""
        self.cause: BaseException | None = None
        self.notes: list[str] = []
        self.thread = threading.Thread(target=self.run, name=f"checkpoint {snapshot.step}", daemon=True)

    def run(self) -> None:
        """Write the checkpoint. Raises nothing: see `error`."""
        try:
            self._on_all(self._copy)
            self._on_all(self._prepare, only_rank_0=True)
            parts = self._on_all(self._write)
            self._on_all(lambda: self._commit(parts), only_rank_0=True)
        except _WriteFailed as failure:
            self.error = str(failure)
        except Exception as error:  # the ranks could not communicate
            self.error, self.cause = f"the ranks lost each other while they wrote it: {error}", error
        if self.error and self._rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)  # frees space for the next attempt
        self.snapshot.items, self.snapshot.models = (), {}  # frees the memory of the copies

    # --- the parts ---------------------------------------------------------------------------------------------------

    def _copy(self) -> None:
        try:
            if self._copies:
                for model in self.snapshot.models.values():
                    model.copy()
        finally:
            self.taken.set()

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        self.partial.mkdir()
        for name in (*self.snapshot.models, *([HF_FILES] if self.snapshot.sidecar_files else [])):
            (self.partial / name).mkdir()

    def _write(self) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
        files = FolderWriter(self.partial)
        for name, data in self.snapshot.sidecar_files.items():
            files.write(f"{HF_FILES}/{name}", data)
        for item in self.snapshot.items:
            item.write(files)
        facts, written = {}, files.written
        for folder, model in self.snapshot.models.items():
            inside = FolderWriter(self.partial / folder)
            facts[folder] = model.write(inside)
            written = written | _below(folder, inside)
        return facts, written

    def _commit(self, parts: Sequence[tuple[dict[str, Any], dict[str, dict[str, int]]]]) -> None:
        """On rank 0, after all ranks have written: add the manifest, and give the folder its final name."""
        files = FolderWriter(self.partial)
        listed = {name: entry for _, part in parts for name, entry in part.items()}
        for folder, model in self.snapshot.models.items():
            inside = FolderWriter(self.partial / folder)
            model.finish(inside, [facts[folder] for facts, _ in parts])
            listed |= _below(folder, inside)
        manifest = {"format": FORMAT, "step": self.snapshot.step, "world": len(parts), **self.snapshot.facts}
        files.write(MANIFEST, json.dumps({**manifest, "files": dict(sorted(listed.items()))}, indent=1))
        sync_tree(self.partial)
        remove(self.final)  # a damaged one of this step, or one of a run that was started over
        os.replace(self.partial, self.final)
        sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        try:
            existing = {step_of(path): path for path in complete(self.folder)}
            stay = retained(list(existing), self.snapshot.accuracy, self.settings)
            for step in sorted(existing.keys() - stay):
                remove(existing[step])
        except OSError as error:
            self.notes.append(f"an old checkpoint cannot be removed: {error}")

    # --- ranks -------------------------------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        return dist.get_rank()

    def _on_all(self, part: Callable[[], Any], *, only_rank_0: bool = False) -> list[Any]:
        """Call `part` on every rank, or on rank 0 alone, and wait for all; collective.

        Returns:
            What `part` returned on each rank.

        Raises:
            _WriteFailed: on every rank, because `part` failed on one.
        """
        result, error = None, ""
        if self._rank == 0 or not only_rank_0:
            try:
                result = part()
            except Exception as raised:
                self.cause, error = raised, str(raised) if isinstance(raised, OSError) else repr(raised)
        outcomes = [(result, error)]
        if self.group is not None:
            outcomes = [(None, "")] * dist.get_world_size()
            dist.all_gather_object(outcomes, (result, error), group=self.group)
        for rank, (_, failure) in enumerate(outcomes):
            if failure:
                raise _WriteFailed(failure if len(outcomes) == 1 else f"rank {rank}: {failure}")
        return [each for each, _ in outcomes]


def _below(folder: str, files: FolderWriter) -> dict[str, dict[str, int]]:
    return {f"{folder}/{name}": entry for name, entry in files.written.items()}


class _WriteFailed(Exception):
    """Writing failed on some rank."""
