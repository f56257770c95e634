"""Memory that a process of other devices opens, and memory that is handed back to servers on the same GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

from clipo_megatron.config.schema import DType
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.runtime.platform import VISIBLE_DEVICES, platform
from clipo_megatron.sync.checksums import tile_hash
from clipo_megatron.sync.ipc import payload
from clipo_megatron.training.proving.models import (
    SIZES,
    actor_of,
    configuration,
    packed_rows,
    trainable_of,
    updated,
    write_folder,
)
from clipo_megatron.training.proving.outcome import Outcome, Task, shown
from clipo_megatron.weights.export import export_buckets, plan_export
from clipo_megatron.weights.families import model_spec

_GB = 1e9
# As an engine opens it: a class of the engine's name, then a checksum of each tensor.
_READER = """
import pickle, sys, types
from torch.multiprocessing import reductions
from clipo_megatron.sync.checksums import tile_hash
from clipo_megatron.sync.ipc import FlattenedTensorMetadata
for name in ("sglang", "sglang.srt", "sglang.srt.weight_sync", "sglang.srt.weight_sync.tensor_bucket"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["sglang.srt.weight_sync.tensor_bucket"].FlattenedTensorMetadata = FlattenedTensorMetadata
name = f"rebuild_{sys.argv[2]}_tensor"
if rebuild := getattr(reductions, name, None):
    # An engine takes a GPU's UUID for its own number of that GPU; this process has one GPU, number 0.
    is_mine = lambda word: isinstance(word, str) and word and word in sys.argv[3]
    setattr(reductions, name, lambda *words: rebuild(*(0 if is_mine(word) else word for word in words)))
with open(sys.argv[1], "rb") as file:
    found = pickle.load(file)
for each in found["metadata"]:
    print(each.name, tile_hash([found["flattened_tensor"][each.start_idx : each.end_idx]]))
"""


def handles(task: Task) -> Outcome:
    """Let another process open a bucket of the weights, and compare its checksums with those of a copy of it."""
    outcome = Outcome()
    spec = model_spec(SIZES[task.pick("tiny", "tiny", "1.5B")])
    trainable = trainable_of(configuration(dtype=DType.bf16), spec, task.layout)
    plan = plan_export(spec, task.layout.division, dtype=torch.bfloat16)
    # One bucket tells as much as all.
    bucket, flat = next(export_buckets(plan, [dict(trainable.stage.named_parameters())], task.layout.holder))
    platform().synchronize()
    file = task.folder / "handles"
    file.write_bytes(payload(bucket, flat))
    theirs, ours = _read(file), {name: tile_hash([tensor]) for name, tensor in bucket.views(flat.cpu())}
    wrong = [name for name in ours if theirs.get(name) != ours[name]]
    note = ", ".join(wrong[:3]) or f"{len(ours)} tensors; the process sees {_other_devices() or 'no GPU'}"
    outcome.at_most("tensors whose checksum differs in another process", len(wrong), 0, note=note)
    return outcome


def _other_devices() -> str:
    """This GPU by its UUID, as the only one that another process sees; "" on a CPU."""
    if not platform().has_gpu:
        return ""
    return f"GPU-{torch.get_device_module(platform().device).get_device_properties(platform().device).uuid}"


def _read(file: Path) -> dict[str, str]:
    environment = os.environ | {VISIBLE_DEVICES: _other_devices()}
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(file), platform().name, _other_devices()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise RuntimeError(f"the process that opens the memory failed: {done.stderr.strip().splitlines()[-1]}")
    return dict(line.split() for line in done.stdout.splitlines())


def release(task: Task) -> Outcome:
    """Hand memory back and take it again: what stays, and whether the next update is the same."""
    outcome = Outcome()
    dtype = DType.bf16 if platform().has_gpu else DType.fp32
    folder = write_folder(task.folder / "release", SIZES[task.pick("tiny", "small", "0.6B")])
    rows, tokens, longest = task.pick((1, 64, 32), (1, 256, 64), (2, 8192, 2048))
    losses = []
    for takes_turns in (False, True):
        actor, _ = actor_of(configuration(folder, dtype=dtype, max_tokens=tokens), task.layout)
        batch = list(packed_rows(actor.spec.vocab_size, rows=rows, tokens=tokens, longest=longest))
        updated(actor.trainable, batch)
        if takes_turns:
            actor.offload()
            _tell_what_stays(outcome, actor)
            actor.onload()
        losses.append([updated(actor.trainable, batch)["policy/loss"] for _ in range(2)])
        del actor
        gc.collect()
    limit = 0.0 if not platform().has_gpu else 1e-4
    gap = max(abs(one / other - 1) for one, other in zip(*losses, strict=True))
    outcome.at_most("losses after a release and restore, relative difference", gap, limit)
    return outcome


def _tell_what_stays(outcome: Outcome, actor: PolicyActor) -> None:
    weights = sum(each.nbytes for each in actor.stage.parameters())
    gradients = sum(each.grad_data.untyped_storage().size() for each in actor.trainable.model.buffers)
    outcome.at_most("gradients after a release", gradients, 0, unit="B")
    if platform().has_gpu:
        reserved, note = torch.accelerator.memory_reserved(), f"weights are {shown(weights, 'B')}"
        outcome.at_most("reserved after a release", reserved, weights + _GB, unit="B", note=note)
    else:
        outcome.skip("reserved after a release", "a CPU has no allocator that reserves")
