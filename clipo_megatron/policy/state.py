"""The policy's parameters and optimizer on disk, in Megatron's torch_dist format: loadable in any TP x PP x DP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: F401  (to adapt)

from clipo_megatron.device import platform
from clipo_megatron.policy.optimizer import PolicyOptimizer

# The optimizer's state in the shape of the parameters, so that another layout can cut it anew.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_policy(folder: Path, stage: torch.nn.Module, optimizer: PolicyOptimizer) -> None:
    """Write parameters, optimizer and learning-rate schedule; collective, `folder` exists and is empty."""
    with _megatron_here():
        _allocate_moments(optimizer)
        dist_checkpointing.save(_sharded(stage, optimizer, is_loading=False), str(folder))


def load_policy(folder: Path, stage: torch.nn.Module, optimizer: PolicyOptimizer) -> None:
    """Restore what `save_policy` wrote, in this run's layout; collective.

    Raises:
        Whatever Megatron raises for a checkpoint of another architecture, which names the key or shape.
    """
    with _megatron_here():
        _allocate_moments(optimizer)
        state = dist_checkpointing.load(_sharded(stage, optimizer, is_loading=True), str(folder))
        stage.load_state_dict(state["model"])
        optimizer.inner.load_state_dict(state["optimizer"])
    optimizer.schedule.load_state_dict(state["schedule"])
    for _, moments in _moments(optimizer):
        if "step" in moments:
            # Megatron hands one tensor to all parameters, and torch's Adam counts in place.
            moments["step"] = moments["step"].clone()


@contextmanager
def _megatron_here() -> Iterator[None]:
    """Megatron loads its writers late; within, they too run on this platform."""
    platform().adapt("megatron.core")
    with platform().cuda_tensor_names():
        yield


def _sharded(stage: torch.nn.Module, optimizer: PolicyOptimizer, *, is_loading: bool) -> dict[str, Any]:
    model = stage.sharded_state_dict(metadata=METADATA)
    return {
        "model": model,
        "optimizer": optimizer.inner.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA),
        "schedule": optimizer.schedule.state_dict(),
    }


def _moments(optimizer: PolicyOptimizer) -> list[tuple[torch.nn.Parameter, dict[str, Any]]]:
    inner = [each.optimizer for each in optimizer.inner.chained_optimizers]
    return [(p, each.state[p]) for each in inner for group in each.param_groups for p in group["params"]]


def _allocate_moments(optimizer: PolicyOptimizer) -> None:
    """Megatron reads the state of every parameter; torch's Adam makes it at the first step only."""
    for parameter, moments in _moments(optimizer):
        if not moments:
            moments["step"] = torch.tensor(0.0)
            moments["exp_avg"] = torch.zeros_like(parameter.data)
            moments["exp_avg_sq"] = torch.zeros_like(parameter.data)
