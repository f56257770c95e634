"""One checkpoint on its way to disk: what was taken is written, checksummed, forced to disk and renamed.

Ranks write their own files and meet four times: when the state is copied, when the folder is there, when all have
written, and when rank 0 has renamed. They meet in a group of their own, so that a thread can do it while training
communicates.
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

from clipo_megatron.checkpoint.retention import (
    MANIFEST,
    Retention,
    complete,
    name_of,
    remove,
    step_of,
    sweep,
)
from clipo_megatron.checkpoint.states import PolicyState, Taken
from clipo_megatron.config.model_folder import HF_FILES, POLICY
from clipo_megatron.runtime.durable_files import FolderWriter, sync, sync_tree


@dataclass
class Content:
    """What a rank's part of a checkpoint is made of."""

    step: int
    facts: Mapping[str, Any]
    owners: Sequence[Taken]
    models: Mapping[str, PolicyState]  # by folder
    beside: Mapping[str, bytes]
    accuracy: Mapping[int, float] = field(default_factory=dict)


class Writing:
    """Writes a checkpoint; every rank has one. After `thread` has ended, or `run` returned, the outcome is known.

    Args:
        folder: of all checkpoints.
        content: this rank's.
        retention: what stays of the others.
        group: that the ranks meet in, and nobody else; None if there is one rank only.
        copies: whether training goes on meanwhile, so that the policy's state is copied before it is written.

    Attributes:
        taken: set when training may change the state.
        error: why there is no checkpoint; empty if there is. The same on every rank.
        cause: the exception behind it, on the rank where it was raised.
        notes: what did not go well and costs nothing that is safe; on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        content: Content,
        retention: Retention,
        group: dist.ProcessGroup | None,
        *,
        copies: bool = False,
    ) -> None:
        self.folder, self.content, self.retention, self.group = folder, content, retention, group
        self.copies, self.taken = copies, threading.Event()
        self.final = folder / name_of(content.step)
        self.partial = folder / f".{self.final.name}.partial"
        self.error = ""
        self.cause: BaseException | None = None
        self.notes: list[str] = []
        self.thread = threading.Thread(target=self.run, name=f"checkpoint {content.step}", daemon=True)

    def run(self) -> None:
        """All of it; raises nothing."""
        try:
            self._together(self._copy)
            self._together(self._prepare, only_rank_0=True)
            parts = self._together(self._write)
            self._together(lambda: self._commit(parts), only_rank_0=True)
        except _Failed as failure:
            self.error = str(failure)
        except Exception as error:  # the ranks could not meet
            self.error, self.cause = f"the ranks lost each other while they wrote it: {error}", error
        if self.error and self._rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)  # room for what else has to be written
        self.content.owners, self.content.models = (), {}  # the memory of the copy

    # --- the parts ---------------------------------------------------------------------------------------------------

    def _copy(self) -> None:
        try:
            if self.copies:
                for state in self.content.models.values():
                    state.copy()
        finally:
            self.taken.set()

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        for name in {POLICY, *self.content.models, *([HF_FILES] if self.content.beside else [])}:
            (self.partial / name).mkdir(parents=True)

    def _write(self) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
        files = FolderWriter(self.partial)
        for name, data in self.content.beside.items():
            files.write(f"{HF_FILES}/{name}", data)
        for owner in self.content.owners:
            owner.write(files)
        facts, written = {}, files.written
        for folder, state in self.content.models.items():
            model = FolderWriter(self.partial / folder)
            facts[folder] = state.write(model)
            written = written | _below(folder, model)
        return facts, written

    def _commit(self, parts: Sequence[tuple[dict[str, Any], dict[str, dict[str, int]]]]) -> None:
        """On rank 0, when all is written but what tells of it."""
        files = FolderWriter(self.partial)
        listed = {name: entry for _, part in parts for name, entry in part.items()}
        for folder, state in self.content.models.items():
            model = FolderWriter(self.partial / folder)
            state.finish(model, [facts[folder] for facts, _ in parts])
            listed |= _below(folder, model)
        manifest = {"step": self.content.step, "world": len(parts), **self.content.facts}
        files.write(MANIFEST, json.dumps({**manifest, "files": dict(sorted(listed.items()))}, indent=1))
        sync_tree(self.partial)
        remove(self.final)  # of this step, but damaged or of an attempt that was started over
        os.replace(self.partial, self.final)
        sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        try:
            there = {step_of(path): path for path in complete(self.folder)}
            stay = self.retention.stays(list(there), self.content.accuracy)
            for step in sorted(there.keys() - stay):
                remove(there[step])
        except OSError as error:
            self.notes.append(f"an old checkpoint cannot be removed: {error}")

    # --- ranks -------------------------------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        return dist.get_rank()

    def _together(self, part: Callable[[], Any], *, only_rank_0: bool = False) -> list[Any]:
        """Do a part on every rank, or on one, and wait for all.

        Returns:
            What each rank's part returned.

        Raises:
            _Failed: some rank's part failed; on every rank.
        """
        result, error = None, ""
        if self._rank == 0 or not only_rank_0:
            try:
                result = part()
            except Exception as raised:
                self.cause, error = raised, str(raised) if isinstance(raised, OSError) else repr(raised)
        told = [(result, error)]
        if self.group is not None:
            told = [(None, "")] * dist.get_world_size()
            dist.all_gather_object(told, (result, error), group=self.group)
        for rank, (_, failure) in enumerate(told):
            if failure:
                raise _Failed(failure if len(told) == 1 else f"rank {rank}: {failure}")
        return [each for each, _ in told]


def _below(folder: str, files: FolderWriter) -> dict[str, dict[str, int]]:
    return {f"{folder}/{name}": entry for name, entry in files.written.items()}


class _Failed(Exception):
    """A part failed on some rank."""
