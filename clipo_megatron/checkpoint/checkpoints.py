"""The checkpoints of a run: when they are taken, what became of them, and which one a run resumes from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.checkpoint.retention import PICKLED, complete, defect, newest_first, sweep
from clipo_megatron.checkpoint.states import (
    CheckpointContents,
    CheckpointError,
    has_state,
    read_state,
    take_snapshot,
)
from clipo_megatron.checkpoint.writing import CheckpointSnapshot, CheckpointWriter
from clipo_megatron.config.errors import is_for_users
from clipo_megatron.config.schema import CheckpointConfig
from clipo_megatron.runtime.manifest import changed_file, read_manifest
from clipo_megatron.runtime.platform import platform


class Checkpoints:
    """The checkpoints of one run. All methods but `complete`, `has`, `wait_for_snapshot` and `close` are collective.

    An asynchronous save copies the models in a thread. Training may read them meanwhile, and calls `wait_for_snapshot`
    before it changes them.

    A save that fails leaves older checkpoints as they are. It is a warning until `settings.max_failed_saves` in a row
    have failed: a brief failure of the file system should not end a run of weeks.

    Args:
        folder: holds all checkpoints; created by the first save.
        contents: what a checkpoint holds.
        settings: which checkpoints stay, asynchronous or not, deadline, failures.
        say: prints a line; on rank 0.
        accuracy: returns the held-out accuracy by step, as far as known; for `settings.keep_best`.
    """

    def __init__(
        self,
        folder: Path,
        contents: CheckpointContents,
        settings: CheckpointConfig,
        *,
        say: Callable[[str], None] = lambda line: None,
        accuracy: Callable[[], Mapping[int, float]] = dict,
    ):
        self.folder, self.contents, self.settings, self.say, self.accuracy = folder, contents, settings, say, accuracy
        self._writer: CheckpointWriter | None = None
        self._group: dist.ProcessGroup | None = None
        self._failed = 0  # saves in a row
        self._step: int | None = None  # step of the checkpoint that holds the current state, or will when written
        self._safe: Path | None = None  # the newest checkpoint that was written or loaded

    def save(self, step: int) -> Path:
        """Take the state after `step` steps, and write it now or in a thread. Waits for the save before.

        Returns:
            The checkpoint's folder, which may not exist yet.

        Raises:
            CheckpointError: too many saves in a row have failed, this one or the one before included.
        """
        self.wait()
        if self._group is None and _world() > 1:
            self._group = platform().host_group(timeout_s=self.settings.deadline_s)
        items = []
        for item in self.contents.items:
            writes = item.per_rank or item.writes
            state = item.stateful.state_dict() if writes or item.gathers else {}
            if writes:
                items.append(take_snapshot(item.stem(_rank()), state))
        models = {folder: model.take() for folder, model in self.contents.models.items()}
        contents = self.contents
        snapshot = CheckpointSnapshot(step, contents.facts, items, models, contents.sidecar_files, self.accuracy())
        self._writer = CheckpointWriter(self.folder, snapshot, self.settings, self._group)
        self._step = step
        if self.settings.asynchronous:
            self._writer.thread.start()
            return self._writer.final
        self._writer.run()
        return self._conclude(self._writer)

    def wait_for_snapshot(self) -> None:
        """Wait until this rank's models of the last save are copied. To be called before anything changes them.

        Raises:
            CheckpointError: `settings.deadline_s` has passed.
        """
        if self._writer is not None and not self._writer.taken.wait(self.settings.deadline_s):
            raise CheckpointError(
                f"the state for {self._writer.final} was not copied within {self.settings.deadline_s:g} s "
                f"(checkpoint.deadline_s). {self._newest_safe()}"
            )

    def poll(self) -> None:
        """Note the outcome of a save whose writing has ended on all ranks.

        Raises:
            CheckpointError: too many saves in a row have failed.
        """
        if self._writer is not None:
            ended = torch.tensor([not self._writer.thread.is_alive()], dtype=torch.int)
            dist.all_reduce(ended, op=dist.ReduceOp.MIN)
            if ended:
                self._conclude(self._writer)

    def wait(self, *, last: bool = False) -> None:
        """Wait for a checkpoint that is being written.

        Args:
            last: no other save follows, so that a failure is always an error.

        Raises:
            CheckpointError: too many saves in a row have failed, or writing did not end in time.
        """
        writer = self._writer
        if writer is None:
            return
        start = time.monotonic()
        writer.thread.join(self.settings.deadline_s)
        hangs = torch.tensor([writer.thread.is_alive()], dtype=torch.int)
        dist.all_reduce(hangs, op=dist.ReduceOp.MAX)
        if hangs:
            self._writer = None
            raise CheckpointError(
                f"{writer.final} was not written within {time.monotonic() - start:.0f} s (checkpoint.deadline_s = "
                f"{self.settings.deadline_s:g}): does the file system hang? {self._newest_safe()}"
            )
        self._conclude(writer, last=last)

    def close(self) -> None:
        """Give a checkpoint that is being written time to end, when a run has failed."""
        if self._writer is not None:
            self._writer.thread.join(self.settings.deadline_s)

    def complete(self) -> list[Path]:
        """Checkpoints whose files all exist in their full size, oldest first."""
        return complete(self.folder)

    def has(self, step: int) -> bool:
        """Whether the current state, that after `step` steps, was loaded, saved or is being saved."""
        return self._step == step

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint of this run, None if there is none; see `newest`."""
        return newest(self.folder, self.say)

    def load(self, path: Path) -> int:
        """Restore everything from a checkpoint.

        Returns:
            The number of steps done.

        Raises:
            CheckpointError: the checkpoint is of another model or algorithm, lacks the state of an item, or has a
                changed file that would be unpickled.
        """
        manifest = read_manifest(path)
        self._check_facts(path, manifest)
        if reason := _first_nonempty(changed_file(path, names=PICKLED)):
            raise CheckpointError(f"{path} is damaged: {reason}. Remove that folder to use an older one")
        self.wait_for_snapshot()
        for folder, model in self.contents.models.items():
            with _named(path, folder):
                model.load(path / folder)
        for item in self.contents.items:
            stem = item.stem(_rank())
            if not has_state(path, stem):
                if item.optional or (item.per_rank and manifest.get("world") != _world()):
                    continue  # written by another number of ranks: this one keeps its initial state
                raise CheckpointError(f"{path} has no state of {item.name}: remove that folder to use an older one")
            with _named(path, item.name):
                item.stateful.load_state_dict(read_state(path, stem))
        dist.all_reduce(torch.zeros(1))
        self._step, self._safe = int(manifest["step"]), path
        return self._step

    def _check_facts(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Compare a checkpoint's facts with this run's. Of nested facts, only those that both have are compared: older
        checkpoints have fewer."""
        for name, mine in json.loads(json.dumps(dict(self.contents.facts))).items():
            other = manifest.get(name)
            if name == "layout" or other == mine:
                continue
            if isinstance(mine, dict) and isinstance(other, dict):
                if unknown := sorted(mine.keys() - other.keys()):
                    self.say(
                        f"warning: {path} is from a version that did not record {', '.join(unknown)} of its {name}: "
                        "nobody can tell whether they are this run's"
                    )
                differing = [key for key in mine if key in other and mine[key] != other[key]]
                if not differing:
                    continue
                mine, other = ({key: each[key] for key in differing} for each in (mine, other))
            raise CheckpointError(
                f"{path} was written with {name} = {_spell(other)}, and this run has {_spell(mine)}: "
                "it cannot go on from there. Restore that setting, choose another train.output, or start over "
                "with checkpoint.resume=false"
            )

    def _conclude(self, writer: CheckpointWriter, *, last: bool = False) -> Path:
        """Note the outcome of a save whose writing has ended."""
        self._writer = None
        for note in writer.notes:
            self.say(f"warning: {note}")
        if not writer.error:
            self._failed, self._safe = 0, writer.final
            return writer.final
        self._failed += 1
        if self._step == writer.snapshot.step:
            self._step = None
        message = f"{writer.final} cannot be written: {writer.error}. {self._newest_safe()}"
        if last or self._failed >= self.settings.max_failed_saves:
            again = f" ({self._failed} saves in a row have failed)" if self._failed > 1 else ""
            raise CheckpointError(
                f"{message}{again} Free space or correct train.output; the same command goes on from there"
            ) from writer.cause
        self.say(
            f"warning: {message} Training goes on; it ends if {self.settings.max_failed_saves} saves in a row fail"
        )
        return writer.final

    def _newest_safe(self) -> str:
        return f"The newest checkpoint is {self._safe}." if self._safe else "There is no checkpoint yet."


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint of a run, the same on every rank; None where there is none at all. Collective.

    A line is printed about each damaged one; what a killed process left half written is removed.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    if _rank() == 0:
        sweep(folder)
    damaged = []
    for path in _from_rank_0(lambda: newest_first(folder)):
        reason = _from_rank_0(lambda path=path: defect(path))
        if not reason and not (reason := _first_nonempty(changed_file(path, share=_rank(), shares=_world()))):
            return path
        damaged.append(f"{path} is damaged: {reason}")
        say(f"warning: {damaged[-1]}; looking for an older checkpoint")
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is complete: {damaged[0]}. Restore the file, or start over with "
            "checkpoint.resume=false"
        )
    return None


@contextmanager
def _named(path: Path, part: str) -> Iterator[None]:
    """A context in which whatever a damaged file leads to becomes an error that names the checkpoint and its part."""
    try:
        yield
    except Exception as error:
        if is_for_users(error):
            raise
        raise CheckpointError(
            f"{path} has a state of {part} that cannot be loaded ({type(error).__name__}: {error}). Remove that folder "
            "to use an older one"
        ) from error


def _spell(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return "nothing" if fact is None else str(fact)


def _rank() -> int:
    return dist.get_rank()


def _world() -> int:
    return dist.get_world_size()


def _first_nonempty(mine: str) -> str:
    """The text of the first rank whose text is not empty, on every rank; collective."""
    texts = [""] * _world()
    dist.all_gather_object(texts, mine)
    return next(filter(None, texts), "")


def _from_rank_0(ask: Callable[[], Any]) -> Any:
    """What `ask` returns on rank 0, on every rank; collective. File systems may show ranks different things."""
    box = [ask() if _rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
