"""`clipo prove`: the small slice of each check holds its limits, and the checks find what they are there to find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipo_megatron.cli.prove import predicted
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.activations import Kernels
from clipo_megatron.planning.hardware import Assumptions
from clipo_megatron.planning.memory import trainer_memory
from clipo_megatron.policy import parallel
from clipo_megatron.runtime.platform import platform
from clipo_megatron.training.proving.checks import CHECKS, outcome_of
from clipo_megatron.training.proving.outcome import Prediction
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec

BY_NAME = {check.name: check for check in CHECKS}


def outcome(name: str, folder: str) -> dict[str, Any]:
    """What the small slice of a check finds on this rank."""
    return outcome_of(BY_NAME[name], Path(folder), predicted, quick=True)


def compared(folder: str, error: float) -> dict[str, Any]:
    """What is found against a reference of this same process, whose tensors are made wrong by a relative error."""
    outcome("reference", folder)
    for path in Path(folder).glob("*.pt"):
        torch.save({name: value * (1 + error) for name, value in torch.load(path).items()}, path)
    parallel.shutdown()
    platform().init_process_group(0, 1, timeout_s=600, store=torch.distributed.HashStore())
    return outcome("agreement", folder)


def refused(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines whose limit does not hold."""
    return [line for line in found["lines"] if line["holds"] is False]


@pytest.mark.parametrize(
    "name",
    [
        "versions",
        "kernels",
        "drift",
        "logprobs",
        "attention",
        "updates",
        "states",
        "release",
        pytest.param("handles", marks=pytest.mark.full),  # starts a process that imports everything
    ],
)
def test_the_small_slice_of_a_check_holds_its_limits(ranks, tmp_path, name):
    [found] = ranks.run(outcome, 1, name, str(tmp_path))
    assert found["lines"] and refused(found) == []


@pytest.mark.parametrize("error", [0.0, 1e-4])
def test_rows_of_many_rollouts_agree_with_rows_of_one_and_an_error_is_noticed(ranks, tmp_path, error):
    [found] = ranks.run(compared, 1, str(tmp_path), error)
    assert [line["holds"] for line in found["lines"]] == [error == 0.0]


def as_if_on_a_gpu(config: RunConfig, spec: ModelSpec, context: float) -> Prediction:
    """The plan of a machine with a GPU, whose fused kernels keep less than a CPU's."""
    memory = trainer_memory(config, spec, ParallelDivision(), 1, Assumptions(), kernels=Kernels.on_gpus({}))
    return replace(predicted(config, spec, context), memory=memory[0].parts)


def memory_of_updates(folder: str, gpu: bool) -> list[str]:
    """The parts of a model's memory that are not as planned, by the plan of this machine, or by that of a GPU."""
    found = outcome_of(BY_NAME["updates"], Path(folder), as_if_on_a_gpu if gpu else predicted, quick=True)
    compared = [line for line in found["lines"] if "against the plan" in line["what"] and line["holds"] is not None]
    assert len(compared) == 4, "weights, gradients, optimizer, activations"
    return [line["what"] for line in compared if not line["holds"]]


def test_a_cpu_keeps_what_the_plan_says_of_cpus(ranks, tmp_path):
    assert ranks.run(memory_of_updates, 1, str(tmp_path), False) == [[]]
    assert ranks.run(memory_of_updates, 1, str(tmp_path), True) == [["tiny: activations against the plan"]]


def test_every_check_is_tried_here():
    tried = {"versions", "kernels", "drift", "logprobs", "attention", "updates", "states", "release", "handles"}
    assert set(BY_NAME) == tried | {"reference", "agreement"}
