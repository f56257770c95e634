"""Checkpoints of things small enough to compare: two items and a "policy" of one file a rank."""

import json
from pathlib import Path

import torch

from clipo_megatron.checkpoint import CheckpointContents, CheckpointItem, Checkpoints
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig


class Counter:
    """Has a state of a tensor and of plain values of every kind."""

    def __init__(self):
        self.state = {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def fill(self, step):
        self.state = {
            "tensor": torch.full((3, 4), step / 3),
            "nested": {1: [step, 2.5, None, True, "x"], "t": [torch.arange(step), {"deep": torch.tensor(1.0 / 3)}]},
        }


class Model:
    """A "policy" that is never loaded; `take` returns its snapshot."""

    def __init__(self, take):
        self.take = take

    def load(self, folder):
        pass


class Weights:
    """The snapshot of a "policy": one file a rank, described by a file of rank 0."""

    def __init__(self, content, *, broken=None, gate=None):
        self.content, self.broken, self.gate = content, broken, gate

    def copy(self):
        pass

    def write(self, files):
        if self.gate is not None:
            self.gate.wait()
        if self.broken is not None:
            raise self.broken
        files.write(f"weights.{torch.distributed.get_rank()}.bin", self.content)
        return len(self.content)

    def finish(self, files, written):
        files.write("metadata.json", json.dumps(written))
        files.write(".metadata", b"a pickle")


def build(folder, *, facts=None, said=None, accuracy=dict, **settings):
    """Checkpoints of two items, one of them of every rank, and of a "policy" in one file a rank."""
    rank = torch.distributed.get_rank()
    head, sampler = Counter(), Counter()
    contents = CheckpointContents(
        [CheckpointItem("head", head, writes=rank == 0), CheckpointItem("sampler", sampler, per_rank=True)],
        {POLICY: Model(lambda: Weights(bytes([rank, len(head.state.get("nested", {}))]) * 4096))},
        {"model": {"hidden": 64, "layers": 4}, "layout": {"pp": 1}} if facts is None else facts,
    )
    checkpoints = Checkpoints(
        Path(folder) / "checkpoints",
        contents,
        CheckpointConfig(**{"asynchronous": False, "max_failed_saves": 1, **settings}),
        say=(said if said is not None else []).append,
        accuracy=accuracy,
    )
    return checkpoints, head, sampler


def saved(folder, steps, **options):
    checkpoints, head, sampler = build(folder, **options)
    for step in steps:
        head.fill(step)
        sampler.fill(step + torch.distributed.get_rank())
        checkpoints.save(step)
    checkpoints.wait(last=True)
    return checkpoints


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def saved_quietly(folder, steps):
    saved(folder, steps)


def newest(folder, **options):
    said = []
    checkpoints, _, _ = build(folder, said=said, **options)
    found = checkpoints.latest()
    return (found.name if found else None), said


def failure(case, *args, **options):
    try:
        case(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None
