"""A snapshot while updates go on, and a resume from it: equal to a run that was left alone, and what it costs."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipo_megatron.config.schema import DType
from clipo_megatron.policy.checkpoint.snapshot import TrainableSnapshot
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.durable_files import FolderWriter
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.models import SIZES, configuration, packed_rows, trainable_of, updated
from clipo_megatron.training.proving.outcome import Outcome, Task, shown
from clipo_megatron.weights.families import model_spec

SAVED_AFTER, UPDATES = 2, 5


def measure(task: Task) -> Outcome:
    """Train twice alike, once with a snapshot, and once from the snapshot's files; compare the last weights."""
    outcome = Outcome()
    name = task.pick("tiny", "small", "0.6B")
    spec = model_spec(SIZES[name])
    rows, tokens, longest = task.pick((1, 64, 32), (1, 256, 64), (4, 8192, 2048))
    config = configuration(dtype=DType.bf16 if platform().has_gpu else DType.fp32, max_tokens=tokens)
    batch = list(packed_rows(spec.vocab_size, rows=rows, tokens=tokens, longest=longest))

    def trained(begin: Callable[[Trainable], int], then: Callable[[Trainable, int], None] = lambda *_: None) -> Tensor:
        trainable = trainable_of(config, spec, task.layout)
        for number in range(begin(trainable), UPDATES):
            updated(trainable, batch)
            then(trainable, number + 1)
        gc.collect()  # of the model before
        return torch.cat([each.detach().float().cpu().view(-1) for each in trainable.stage.parameters()])

    folder = task.folder / "snapshot"
    folder.mkdir()
    watched = _Watched(folder)
    alone = trained(lambda _: 0)
    noise = _gap(trained(lambda _: 0), alone)
    saved = _gap(trained(lambda _: 0, watched.after_update), alone)

    def resume(trainable: Trainable) -> int:
        TrainableCheckpointer(trainable).load(folder)
        return SAVED_AFTER

    resumed = _gap(trained(resume), alone)
    note = f"two runs alike differ by {noise:.1e}"
    # Two draws of the same noise: the largest of a few may be some times another.
    outcome.at_most("weights of a run with a snapshot, largest difference", saved, 4 * noise, note=note)
    outcome.at_most("weights of a resumed run, largest difference", resumed, 4 * noise, note=note)
    note = f"{shown(watched.nbytes, 'B')}, written in {watched.written_s:.1f} s"
    share = watched.waited_s / max(watched.updates_s, 1e-9)
    outcome.at_most("updates wait for the snapshot", share, task.pick(5.0, 0.5, 0.05), unit="%", note=note)
    outcome.measured["snapshot_bytes_per_s"] = watched.nbytes / max(watched.written_s, 1e-9)
    return outcome


def _gap(weights: Tensor, expected: Tensor) -> float:
    return float((weights - expected).abs().max())


class _Watched:
    """Takes a snapshot after some updates, writes it in a thread, and counts how long the updates after it wait."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.waited_s = self.updates_s = self.written_s = 0.0
        self.nbytes = 0
        self._copied = threading.Event()
        self._since = 0.0
        self._thread: threading.Thread | None = None

    def after_update(self, trainable: Trainable, number: int) -> None:
        """Take it when its time has come; after the last update, wait until it is written."""
        platform().synchronize()
        now = time.perf_counter()
        if number == 1:  # the first copy of a run makes the host memory that the others use again
            self._checkpointer = TrainableCheckpointer(trainable)
            self._checkpointer.take().copy()
        elif number == SAVED_AFTER:
            trainable.pre_mutation_hook = self._wait
            snapshot = self._checkpointer.take()
            self.nbytes = snapshot.nbytes
            self._thread = threading.Thread(target=self._write, args=(snapshot,))
            self._thread.start()
            self.waited_s += time.perf_counter() - now
            self._since = now
        elif number == UPDATES and self._thread is not None:
            self.updates_s = now - self._since
            self._thread.join()

    def _wait(self) -> None:
        start = time.perf_counter()
        self._copied.wait()
        self.waited_s += time.perf_counter() - start

    def _write(self, snapshot: TrainableSnapshot) -> None:
        start = time.perf_counter()
        try:
            snapshot.copy()
        finally:
            self._copied.set()
        files = FolderWriter(self.folder)
        snapshot.finish(files, [snapshot.write(files)])
        self.written_s = time.perf_counter() - start
