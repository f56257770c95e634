"""The policy's parameters and optimizer on disk, in Megatron's torch_dist format: loadable in any TP x PP x DP x EP.

Each layer has keys of its own ("decoder.layers.7...."), experts are stacked on a first axis. Older checkpoints have
the layers stacked too, under keys without a number; they are read as well.

The optimizer's state is written in the shape of the parameters, by each data-parallel rank what it has a shard of, so
that nothing has to be gathered. Megatron's own gathering (0.16.1, "fully_reshardable") places the moments wrongly where
a gradient buffer has more than one bucket, as with tied embeddings and pipeline stages: it forgets the padding between
buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import fully_parallel  # noqa: F401
from megatron.core.dist_checkpointing.strategies import torch as torch_dist  # noqa: F401
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from clipo_megatron.policy.checkpoint.snapshot import HostBuffer, SnapshotPlan, TrainableSnapshot, Whole
from clipo_megatron.policy.optimizer import DistributedAdamW
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.platform import platform

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the fp32 parameter that the optimizer updates
_NOTHING = torch.empty(0)


class TrainableCheckpointer:
    """Takes the state of the policy or of the critic on this rank, and restores it.

    The state is parameters, masters and moments of the optimizer, and the learning-rate schedule.
    """

    def __init__(self, trainable: Trainable) -> None:
        self.stage, self.optimizer = trainable.stage, trainable.optimizer
        self._buffer = HostBuffer()
        self._wholes: list[ShardedTensor | ShardedTensorFactory] = []  # the parameters' entries
        self._plan: SnapshotPlan | None = None
        self._checked = False

    def take(self) -> TrainableSnapshot:
        """The state of now. It has to be copied or written before the next update.

        The first time it is collective: the ranks compare what they hold, every element of every tensor once.
        """
        with _megatron_here():
            if self._plan is None or not self._plan.lasts:
                self._plan = self._make_plan()
            plan = self._plan
            # What is no parameter may change in any forward.
            fresh = [not isinstance(each.data, torch.nn.Parameter) for each in self._wholes]
            sources = [
                each.data.detach().clone() if alone else each.data.detach()
                for each, alone in zip(self._wholes, fresh, strict=True)
            ]
            for _, _, shard in _shards(self.optimizer):
                states = _state_of(shard)
                sources += [states[key].view(-1) if states else _NOTHING for key in (MASTER, *MOMENTS)]
            fresh += [False] * (len(sources) - len(fresh))
        return TrainableSnapshot(plan.parts(sources, fresh), plan.objects, plan.common | self._common(), self._buffer)

    def load(self, folder: Path) -> None:
        """Restore what was taken, in this run's layout; collective.

        Raises:
            Whatever Megatron raises for a checkpoint of another architecture, which names the key or shape.
        """
        with _megatron_here():
            model = _sharded(self.stage, stacked=_is_stacked(folder))
            template = {"model": model, "optimizer": _in_model_shape(model, self.optimizer, _blank)}
            state = dist_checkpointing.load(template, str(folder))
            self.stage.load_state_dict(state["model"])
        self.optimizer.schedule.load_state_dict(state["schedule"])
        for name, _, shard in _shards(self.optimizer):
            for key, own in _state_of(shard, updates=state["updates"]).items():
                own.copy_(state["optimizer"][name][key].view(-1)[shard.start : shard.stop].view_as(own))

    def _make_plan(self) -> SnapshotPlan:
        model = _sharded(self.stage)
        states = _in_model_shape(model, self.optimizer, _nowhere)
        self._wholes = list(nested_values(extract_sharded_tensors_and_factories(model)[0]))
        spans = {name: (shard.start, shard.stop) for name, _, shard in _shards(self.optimizer)}
        wholes = [
            *(Whole(each) for each in self._wholes),
            *(Whole(each, spans[name]) for name, kinds in states.items() for each in kinds.values()),
        ]
        sharded, common = save_preprocess({"model": model, "optimizer": states, **self._common()}, not self._checked)
        self._checked = True
        return SnapshotPlan(wholes, sharded, common)

    def _common(self) -> dict[str, Any]:
        return {"schedule": self.optimizer.schedule.state_dict(), "updates": _updates(self.optimizer)}


def _sharded(stage: torch.nn.Module, *, stacked: bool = False) -> dict[str, Any]:
    """The parameters as a checkpoint has them."""
    return stage.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked})


def _is_stacked(folder: Path) -> bool:
    """Whether a checkpoint has all layers under one key."""
    layers = "decoder.layers."
    keys = FileSystemReader(folder).read_metadata().state_dict_metadata
    return any(key.startswith(layers) and not key.removeprefix(layers)[:1].isdigit() for key in keys)


class _Shard:
    """This data-parallel rank's part of one parameter in the distributed optimizer; empty where it holds none."""

    def __init__(self, inner: DistributedOptimizer, parameter: torch.nn.Parameter):
        self.inner, self.group = inner, inner.data_parallel_group
        self.start = self.stop = 0
        self.main: Tensor | None = None
        if parameter in inner.model_param_group_index_map:
            group, order = inner.model_param_group_index_map[parameter]
            span = inner._get_model_param_range_map(parameter)["param"]
            self.start, self.stop = span.start, span.end
            self.main = inner.optimizer.param_groups[group]["params"][order]


def _state_of(shard: _Shard, *, updates: int | None = None) -> dict[str, Tensor]:
    """Master parameter and moments of a shard; zeros before its first update, which Adam has to find without a state.

    With `updates` the state is allocated, and counted on from there.
    """
    if shard.main is None:
        return {}
    state = shard.inner.optimizer.state[shard.main]
    if updates is not None:
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(shard.main.data))
        # torch's Adam counts in a tensor of each parameter, TE's and apex's in the group
        state["step"] = torch.tensor(float(updates))
        for group in shard.inner.optimizer.param_groups:
            if "step" in group:
                group["step"] = updates
    moments = {key: state[key] if key in state else torch.zeros_like(shard.main.data) for key in MOMENTS}
    return {MASTER: shard.main.data, **moments}


def _in_model_shape(model: dict[str, Any], optimizer: DistributedAdamW, fill: Any) -> dict[str, dict[str, Any]]:
    """Sharded tensors of the optimizer's state beside those of the parameters, [name][master | exp_avg | ...]."""
    sharded, _ = extract_sharded_tensors_and_factories(model)
    by_parameter = {id(each.data): each for each in nested_values(sharded)}
    return {
        name: {
            key: make_sharded_optimizer_tensor(by_parameter[id(parameter)], whole, prefix=f"optimizer.{key}")
            for key, whole in fill(parameter, shard).items()
        }
        for name, parameter, shard in _shards(optimizer)
    }


def _blank(parameter: torch.nn.Parameter, _shard: _Shard) -> dict[str, Tensor]:
    return {key: torch.empty_like(parameter, dtype=torch.float32).detach() for key in (MASTER, *MOMENTS)}


def _nowhere(parameter: torch.nn.Parameter, _shard: _Shard) -> dict[str, Tensor]:
    """Shapes alone."""
    return {key: torch.empty(parameter.shape, dtype=torch.float32, device="meta") for key in (MASTER, *MOMENTS)}


def _shards(optimizer: DistributedAdamW) -> Iterator[tuple[str, torch.nn.Parameter, _Shard]]:
    """Every trained parameter by name, in the same order on all data-parallel ranks."""
    for inner in optimizer.inner.chained_optimizers:
        trained = {parameter for buffer in inner.buffers for parameter in buffer.param_index_map}
        for chunk in inner.model_chunks:
            for name, parameter in chunk.named_parameters():
                if parameter in trained:
                    yield name, parameter, _Shard(inner, parameter)


def _updates(optimizer: DistributedAdamW) -> int:
    """How many updates Adam has counted; the same for every parameter."""
    for _, _, shard in _shards(optimizer):
        if shard.main is None:
            continue
        state = shard.inner.optimizer.state.get(shard.main, {})
        groups = shard.inner.optimizer.param_groups
        return int(state.get("step", next((group["step"] for group in groups if "step" in group), 0)))
    return 0


@contextmanager
def _megatron_here() -> Iterator[None]:
    """Megatron's checkpoints, imported above for that, work on this platform within."""
    platform().adapt("megatron.core")
    with platform().cuda_tensor_names():
        yield
