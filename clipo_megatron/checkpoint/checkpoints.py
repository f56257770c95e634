"""The checkpoints of a run: when they are taken, what became of them, and which one a run goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.checkpoint import states
from clipo_megatron.checkpoint.retention import (
    MANIFEST,
    PICKLED,
    Retention,
    changed,
    complete,
    defect,
    newest_first,
    sweep,
)
from clipo_megatron.checkpoint.states import CheckpointError, Owner, PolicyState
from clipo_megatron.checkpoint.writing import Content, Writing
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.runtime.platform import platform


class Checkpoints:
    """The checkpoints of one run. All methods but `complete` and `settle` are collective.

    An asynchronous save copies the policy's state in its thread. Training may read it meanwhile, and calls `settle`
    before it changes it.

    A save that fails leaves older checkpoints as they are. It is a warning as long as fewer than `failures` in a row
    have failed: a file system that hiccups should not end a run of weeks.

    Args:
        folder: of all checkpoints; made when the first is saved.
        owners: whose state is kept.
        take_policy: the policy's state of now.
        load_policy: reads its files.
        more: other models, by the folder that they have beside the policy's: what takes their state, what reads it.
        retention: which checkpoints stay.
        facts: what a checkpoint and the run that resumes from it must agree on; "layout" may differ.
        say: takes one line of news; on rank 0.
        beside: files of a checkpoint's hf/, by name; on rank 0. With them it can be exported without the source.
        accuracy: held-out accuracy by step, as far as it is known; for `retention.best`.
        asynchronous: whether `save` leaves copying and writing to a thread.
        deadline_s: for the writing of one checkpoint.
        failures: saves in a row whose failure is an error.
    """

    def __init__(
        self,
        folder: Path,
        owners: Sequence[Owner],
        *,
        take_policy: Callable[[], PolicyState | None],
        load_policy: Callable[[Path], None],
        more: Mapping[str, tuple[Callable[[], PolicyState], Callable[[Path], None]]] | None = None,
        retention: Retention,
        facts: Mapping[str, Any],
        say: Callable[[str], None] = lambda line: None,
        beside: Mapping[str, bytes] | None = None,
        accuracy: Callable[[], Mapping[int, float]] = dict,
        asynchronous: bool = False,
        deadline_s: float = 1800.0,
        failures: int = 1,
    ):
        self.folder, self.owners, self.retention, self.facts, self.say = folder, list(owners), retention, facts, say
        self.take_policy, self.load_policy, self.more = take_policy, load_policy, dict(more or {})
        self.beside, self.accuracy = dict(beside or {}), accuracy
        self.asynchronous, self.deadline_s, self.failures = asynchronous, deadline_s, failures
        self._writing: Writing | None = None
        self._group: dist.ProcessGroup | None = None
        self._failed = 0  # saves in a row
        self._step: int | None = None  # of the checkpoint that holds the state of now, or will when it is written
        self._safe: Path | None = None  # the newest that was written or loaded

    def save(self, step: int) -> Path:
        """Take the state after `step` steps; write it now, or let a thread write it. Waits for the one before.

        Returns:
            Where it is, or will be.

        Raises:
            CheckpointError: it cannot be written, or the one before could not, and too many in a row could not.
        """
        self.wait()
        if self._group is None and _world() > 1:
            self._group = platform().host_group(timeout_s=self.deadline_s)
        owners = []
        for owner in self.owners:
            writes = owner.per_rank or owner.writes
            state = owner.state_dict() if writes or owner.gathers else {}
            if writes:
                owners.append(states.take(owner.file(_rank()), state))
        policy = self.take_policy()
        models = {POLICY: policy} if policy else {}
        models |= {folder: take() for folder, (take, _) in self.more.items()}
        content = Content(step, self.facts, owners, models, self.beside, self.accuracy())
        self._writing = Writing(self.folder, content, self.retention, self._group, copies=self.asynchronous)
        self._step = step
        if self.asynchronous:
            self._writing.thread.start()
            return self._writing.final
        self._writing.run()
        return self._conclude(self._writing)

    def settle(self) -> None:
        """Wait until this rank's state of the last save is copied; before anything changes it, at any time.

        Raises:
            CheckpointError: it takes too long.
        """
        if self._writing is not None and not self._writing.taken.wait(self.deadline_s):
            raise CheckpointError(
                f"the state for {self._writing.final} was not copied within {self.deadline_s:g} s "
                f"(checkpoint.deadline_s). {self._remains()}"
            )

    def news(self) -> None:
        """Hear what became of a checkpoint that is being written, if that is decided.

        Raises:
            CheckpointError: too many in a row could not be written.
        """
        if self._writing is not None:
            ended = torch.tensor([not self._writing.thread.is_alive()], dtype=torch.int)
            dist.all_reduce(ended, op=dist.ReduceOp.MIN)
            if ended:
                self._conclude(self._writing)

    def wait(self, *, last: bool = False) -> None:
        """Wait for a checkpoint that is being written.

        Args:
            last: no other follows, so that a failure is an error in any case.

        Raises:
            CheckpointError: it could not be written, and too many in a row could not; or it did not end in time.
        """
        writing = self._writing
        if writing is None:
            return
        start = time.monotonic()
        writing.thread.join(self.deadline_s)
        hangs = torch.tensor([writing.thread.is_alive()], dtype=torch.int)
        dist.all_reduce(hangs, op=dist.ReduceOp.MAX)
        if hangs:
            self._writing = None
            raise CheckpointError(
                f"{writing.final} was not written within {time.monotonic() - start:.0f} s (checkpoint.deadline_s = "
                f"{self.deadline_s:g}): does the file system hang? {self._remains()}"
            )
        self._conclude(writing, last=last)

    def close(self) -> None:
        """Give a checkpoint that is being written the time to end; not collective, for the end of a run that failed."""
        if self._writing is not None:
            self._writing.thread.join(self.deadline_s)

    def complete(self) -> list[Path]:
        """Checkpoints whose files are all there in their full size, oldest first."""
        return complete(self.folder)

    def has(self, step: int) -> bool:
        """Whether the state after `step` steps, which this process holds, was loaded, saved or is being saved."""
        return self._step == step

    def latest(self) -> Path | None:
        """See `newest`."""
        return newest(self.folder, self.say)

    def load(self, path: Path) -> int:
        """Restore every owner.

        Returns:
            How many steps were done.

        Raises:
            CheckpointError: the checkpoint is of another model or algorithm, or an owner's state is missing, or bytes
                have changed that would be run.
        """
        manifest = json.loads((path / MANIFEST).read_text())
        self._compare(path, manifest)
        if reason := _first(changed(path, names=PICKLED)):
            raise CheckpointError(f"{path} is damaged: {reason}. Remove that folder to use an older one")
        self.settle()
        self.load_policy(path / POLICY)
        for folder, (_, load) in self.more.items():
            load(path / folder)
        for owner in self.owners:
            if not owner.reads:
                continue
            file = owner.file(_rank())
            if not states.exists(path, file):
                if owner.optional or (owner.per_rank and manifest["world"] != _world()):
                    continue  # another number of ranks: a rank without a past keeps its fresh state
                raise CheckpointError(f"{path} has no state of {owner.name}: remove that folder to use an older one")
            owner.load_state_dict(states.read(path, file))
        dist.all_reduce(torch.zeros(1))
        self._step, self._safe = int(manifest["step"]), path
        return self._step

    def _compare(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """A checkpoint's facts with this run's. Of details, those that both know count: older ones have fewer."""
        for name, mine in json.loads(json.dumps(dict(self.facts))).items():
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

    def _conclude(self, writing: Writing, *, last: bool = False) -> Path:
        """Take note of a write that has ended."""
        self._writing = None
        for note in writing.notes:
            self.say(f"warning: {note}")
        if not writing.error:
            self._failed, self._safe = 0, writing.final
            return writing.final
        self._failed += 1
        if self._step == writing.content.step:
            self._step = None
        message = f"{writing.final} cannot be written: {writing.error}. {self._remains()}"
        if last or self._failed >= self.failures:
            again = f" ({self._failed} saves in a row have failed)" if self._failed > 1 else ""
            raise CheckpointError(
                f"{message}{again} Free space or correct train.output; the same command goes on from there"
            ) from writing.cause
        self.say(f"warning: {message} Training goes on; it ends if {self.failures} saves in a row fail")
        return writing.final

    def _remains(self) -> str:
        return f"The newest checkpoint is {self._safe}." if self._safe else "There is no checkpoint yet."


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint of a run, the same on every rank; None where there is none at all. Collective.

    Damaged ones are passed over with a word about each; what a killed process left half written is removed.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    if _rank() == 0:
        sweep(folder)
    damaged = []
    for path in _from_rank_0(lambda: newest_first(folder)):
        reason = _from_rank_0(lambda path=path: defect(path))
        if not reason and not (reason := _first(changed(path, share=_rank(), shares=_world()))):
            return path
        damaged.append(f"{path} is damaged: {reason}")
        say(f"warning: {damaged[-1]}; looking for an older checkpoint")
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is complete: {damaged[0]}. Restore the file, or start over with "
            "checkpoint.resume=false"
        )
    return None


def _spell(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return "nothing" if fact is None else str(fact)


def _rank() -> int:
    return dist.get_rank()


def _world() -> int:
    return dist.get_world_size()


def _first(mine: str) -> str:
    """The first rank's word that has one, on every rank."""
    words = [""] * _world()
    dist.all_gather_object(words, mine)
    return next(filter(None, words), "")


def _from_rank_0(ask: Callable[[], Any]) -> Any:
    """Rank 0's answer, on every rank: file systems show ranks different things at times."""
    box = [ask() if _rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
