"""The memory of a model in training, part by part, against the plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipo_megatron.flow import MicroBatch
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.models import updated
from clipo_megatron.training.proving.outcome import Outcome, Prediction, shown

MOST_ERROR = 0.10
NOT_HELD = ("reserve",)  # parts of a plan that are no tensors


def compare_with_plan(outcome: Outcome, name: str, trainable: Trainable, micro: MicroBatch, plan: Prediction) -> None:
    """Add a line for each part, counted by its tensors after an update, and on a GPU one for the allocator's peak."""

    def compare(part: str, found: float, planned: float) -> None:
        note = f"{shown(found, 'B')} of {shown(planned, 'B')} planned"
        outcome.at_most(f"{name}: {part} against the plan", abs(found / planned - 1), MOST_ERROR, unit="%", note=note)

    for part, found in _parts(trainable, micro).items():
        compare(part, found, plan.memory[part])
    if not platform().has_gpu:
        outcome.skip(f"{name}: peak against the plan", "a CPU's allocator does not tell it")
        return
    torch.accelerator.reset_peak_memory_stats()
    updated(trainable, [micro])
    peak = torch.accelerator.max_memory_allocated()
    compare("peak", peak, sum(value for part, value in plan.memory.items() if part not in NOT_HELD))
    free, total = torch.get_device_module(platform().device).mem_get_info()
    # What the process has beside tensors: its context, workspaces, and memory that is kept for later tensors.
    outcome.measured["reserve_bytes"] = max(total - free - peak, outcome.measured.get("reserve_bytes", 0.0))


def _parts(trainable: Trainable, micro: MicroBatch) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer state, and of what a forward of one micro-batch keeps for its backward."""
    states: list[Any] = []
    for inner in trainable.optimizer.inner.chained_optimizers:
        for main, state in inner.optimizer.state.items():
            states += [main] * trainable.model.config.bf16 + list(state.values())
    buffers = [*trainable.model.buffers, *trainable.model.expert_parallel_buffers]
    weights = list(trainable.stage.parameters())
    return {
        "weights": _bytes(weights),
        "gradients": sum(each.grad_data.nbytes for each in buffers),
        "optimizer": _bytes(each for each in states if isinstance(each, Tensor) and each.dim()),
        "activations": _kept_bytes(trainable, micro, weights),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _kept_bytes(trainable: Trainable, micro: MicroBatch, weights: Iterable[Tensor]) -> int:
    """What autograd saves in a forward of the model, weights left out, memory that tensors share counted once."""
    known = {each.untyped_storage().data_ptr() for each in weights}
    kept: dict[int, Tensor] = {}  # alive, since their memory would be given to the next

    def save(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = trainable.stage(micro)
    assert hidden.requires_grad
    return sum(each.untyped_storage().nbytes() for each in kept.values())


def peak_of(work: Callable[[], Any]) -> float:
    """The most bytes that some work takes beside what there was before: of tensors, or on a CPU of the process."""
    if platform().has_gpu:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        work()
        return torch.accelerator.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0
