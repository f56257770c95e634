"""The checks of `clipo prove` in their order, and the process of one. Imports torch in that process only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig
    from clipo_megatron.training.proving.outcome import Prediction
    from clipo_megatron.weights.spec import ModelSpec

TIMEOUT_S = 600.0  # of collectives, which a single rank has none of


@dataclass(frozen=True, slots=True)
class Check:
    """One process of the proof: a function of a module of this package."""

    name: str
    what: str
    place: str  # "module.function"
    cpu_s: float  # about so long it takes on two cores
    gpu_s: float
    hides_gpu: bool = False  # whether it computes what the others are compared with
    is_quick: bool = True  # whether the slice of a few seconds has it


CHECKS = (
    Check("versions", "versions of everything that computes", "machine.versions", 4, 15),
    Check("kernels", "the kernel that each shape of attention gets", "machine.kernels", 5, 20),
    Check("reference", "tiny models on a CPU", "agreement.compute_reference", 8, 30, hides_gpu=True),
    Check("agreement", "tiny models against those on a CPU", "agreement.compare", 8, 30),
    Check("drift", "bf16 against fp32", "drift.measure", 6, 30),
    Check("logprobs", "log-probs against their products", "speed.logprobs", 10, 20),
    Check("attention", "attention over fresh rows", "attention.measure", 6, 25),
    Check("updates", "updates, and memory against the plan", "speed.updates", 12, 120),
    Check("states", "a snapshot during updates, and a resume", "states.measure", 10, 90),
    Check("handles", "memory that another process opens", "sharing.handles", 8, 30),
    Check("release", "memory handed back and taken again", "sharing.release", 6, 40),
)


def run_check(
    check: Check, folder: Path, predict: Callable[[RunConfig, ModelSpec, float], Prediction], *, quick: bool
) -> None:
    """Run a check in this process, and write what it found to <name>.json in `folder`."""
    from clipo_megatron.policy import parallel
    from clipo_megatron.runtime.launcher_env import Launch, export_environment
    from clipo_megatron.runtime.platform import platform

    export_environment(Launch(rank=0, world=1, local_rank=0), os.environ)
    platform().init_process_group(0, 1, timeout_s=TIMEOUT_S)
    try:
        found = outcome_of(check, folder, predict, quick=quick)
    finally:
        parallel.shutdown()
    (folder / f"{check.name}.json").write_text(json.dumps(found))


def outcome_of(
    check: Check, folder: Path, predict: Callable[[RunConfig, ModelSpec, float], Prediction], *, quick: bool
) -> dict[str, object]:
    """What a check finds, as plain values; the default process group of one rank is there already."""
    from clipo_megatron.config.schema import LayoutConfig
    from clipo_megatron.policy.parallel import initialize
    from clipo_megatron.runtime.platform import platform
    from clipo_megatron.training.proving.outcome import ProofScale, Task

    gpu = platform().has_gpu or check.hides_gpu
    scale = ProofScale.quick if quick else ProofScale.gpu if gpu else ProofScale.cpu
    module, _, function = check.place.partition(".")
    work = getattr(import_module(f"{__package__}.{module}"), function)
    return work(Task(scale, initialize(LayoutConfig(), seed=0), folder, predict)).as_json()
