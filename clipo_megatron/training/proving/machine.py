"""Versions of everything that computes, and the kernel that each shape of attention gets."""

from __future__ import annotations

import sys
from importlib import metadata

import torch
from packaging.version import Version
from torch.profiler import ProfilerActivity, profile

from clipo_megatron.config.packages import other_version
from clipo_megatron.flow import Segment
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.attention import attention_of
from clipo_megatron.training.proving.outcome import Outcome, Task, seconds_of, seconds_once

PACKAGES = ("megatron-core", "transformers", "transformer-engine", "flash-attn", "apex", "triton", "sglang", "vllm")
LONGEST_PLAN_S = 0.05
_LEAST_TORCH = "2.11"


def versions(_task: Task) -> Outcome:
    """Versions, and whether they are ones that this package and Megatron take."""
    outcome = Outcome()
    device = torch.get_device_module(platform().device)
    outcome.tell("Python", sys.version.split()[0])
    if platform().has_gpu:
        facts = device.get_device_properties(platform().device)
        library = getattr(device, platform().backend).version()
        outcome.tell("GPU", facts.name, f"{facts.total_memory / 1e9:.0f} GB")
        outcome.tell("collectives", f"{platform().backend} {'.'.join(map(str, library))}")
    else:
        outcome.tell("GPU", "none", "this is a CPU's proof: its limits are a CPU's")
    outcome.check("torch", torch.__version__, f">= {_LEAST_TORCH}", Version(torch.__version__) >= Version(_LEAST_TORCH))
    for name in PACKAGES:
        try:
            outcome.tell(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            outcome.tell(name, "not installed")
    engine = other_version("transformer-engine", wanted_by="megatron-core") if platform().has_gpu else None
    if engine:
        outcome.check(
            "transformer-engine",
            metadata.version("transformer-engine"),
            "that Megatron takes",
            False,
            note=": ".join(engine),
        )
    return outcome


def kernels(task: Task) -> Outcome:
    """Which operations compute attention, for rows that were never seen before, and what the first of each costs."""
    outcome = Outcome()
    lengths = task.pick([16, 40], [16, 100, 333], [128, 1000, 4001])
    heads, kv_heads, size = task.pick((4, 2, 16), (8, 2, 64), (28, 4, 128))
    seen: set[str] = set()
    attention_of(
        [Segment(0, 64)], task.layout, heads=heads, kv_heads=kv_heads, size=size
    )()  # what the process does once
    for length in lengths:
        segments = [Segment(0, length), Segment(length, length // 2, 0, length), Segment(length + length // 2, 5)]
        call = attention_of(segments, task.layout, heads=heads, kv_heads=kv_heads, size=size)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            first = seconds_once(call)
        used = sorted({event.key.removeprefix("aten::") for event in recorded.key_averages() if _attends(event.key)})
        seen |= set(used)
        name, note = f"kernel for {length} tokens and {length // 2} more", ", ".join(used)
        if platform().has_gpu:
            again = seconds_of(lambda call=call: call())
            outcome.at_most(f"{name}: first call", first - again, LONGEST_PLAN_S, unit="s", note=note)
        else:
            outcome.tell(name, note)
    slow = [each for each in seen if each.endswith("_math")]
    outcome.at_most("math kernels, which keep whole matrices of scores", len(slow), 0, note=", ".join(slow))
    return outcome


def _attends(operation: str) -> bool:
    return "attention" in operation and operation != "aten::scaled_dot_product_attention"
