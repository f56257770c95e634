"""Parameters and optimizer of a model in training as a torch_dist checkpoint, which any TP x PP x DP x EP can load.

Each layer has its own keys ("decoder.layers.7...."); experts are stacked along a first axis. In older checkpoints the
layers are stacked too, under keys without a number; these are read as well.

The optimizer's state has the shape of the parameters, and each data-parallel rank writes the elements of its own shard,
so nothing is gathered. Megatron's own format for this (0.16.1, "fully_reshardable") places moments wrongly where a
gradient buffer has more than one bucket, as with tied embeddings and pipeline stages: it forgets the padding between
buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import fully_parallel  # noqa: F401
from megatron.core.dist_checkpointing.strategies import torch as torch_dist  # noqa: F401
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from clipo_megatron.policy.checkpoint.reading import loaded_state
from clipo_megatron.policy.checkpoint.snapshot import SnapshotPlan, SourceTensor, TrainableSnapshot
from clipo_megatron.policy.host_memory import HostBuffer
from clipo_megatron.policy.optimizer import DistributedAdamW
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.formats.metadata import read_metadata

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the fp32 parameter that the optimizer updates
_EMPTY = torch.empty(0)


class TrainableCheckpointer:
    """Takes the state of the policy or of the critic on this rank, and restores it.

    The state is parameters, masters and moments of the optimizer, and the learning-rate schedule.
    """

    def __init__(self, trainable: Trainable) -> None:
        self.stage, self.optimizer = trainable.stage, trainable.optimizer
        self._buffer = HostBuffer()
        self._parameters: list[ShardedTensor | ShardedTensorFactory] = []  # the stage's, and its buffers
        self._plan: SnapshotPlan | None = None
        self._checked = False  # whether the ranks have checked that nothing is missing and nothing held twice

    def take(self) -> TrainableSnapshot:
        """A snapshot of the current state, to be copied or written before the next update.

        The first call is collective: the ranks check that together they hold every element of every tensor once.
        """
        with _adapted_megatron():
            if self._plan is None or not self._plan.has_fixed_objects:
                self._plan = self._make_plan()
            plan = self._plan
            # Buffers are copied at once, because any forward may change them.
            are_copies = [not isinstance(each.data, torch.nn.Parameter) for each in self._parameters]
            sources = [
                each.data.detach().clone() if is_copy else each.data.detach()
                for each, is_copy in zip(self._parameters, are_copies, strict=True)
            ]
            for _, _, shard in _shards(self.optimizer):
                states = _state_of(shard)
                sources += [states[key].view(-1) if states else _EMPTY for key in (MASTER, *MOMENTS)]
            are_copies += [False] * (len(sources) - len(are_copies))
        parts = plan.parts(sources, are_copies)
        return TrainableSnapshot(parts, plan.objects, plan.common | self._common(), self._buffer)

    def load(self, folder: Path) -> None:
        """Restore the state of a checkpoint, whatever layout wrote it; collective.

        For a checkpoint of another architecture Megatron raises an error that names the key or shape.
        """
        with _adapted_megatron():
            model, absent = _without_absent_states(_sharded(self.stage, stacked=_is_stacked(folder)), folder)
            template = {"model": model, "optimizer": _sharded_optimizer_state(model, self.optimizer, _empty_tensors)}
            state = loaded_state(template, folder)
            self.stage.load_state_dict(state["model"] | dict.fromkeys(absent))
        self.optimizer.schedule.load_state_dict(state["schedule"])
        _set_updates(self.optimizer, state["updates"])
        for name, _, shard in _shards(self.optimizer):
            for key, own in _state_of(shard, allocate=True).items():
                own.copy_(state["optimizer"][name][key].view(-1)[shard.start : shard.stop].view_as(own))

    def _make_plan(self) -> SnapshotPlan:
        model = _sharded(self.stage)
        states = _sharded_optimizer_state(model, self.optimizer, _meta_tensors)
        self._parameters = list(nested_values(extract_sharded_tensors_and_factories(model)[0]))
        spans = {name: (shard.start, shard.stop) for name, _, shard in _shards(self.optimizer)}
        sources = [
            *(SourceTensor(each) for each in self._parameters),
            *(SourceTensor(each, spans[name]) for name, kinds in states.items() for each in kinds.values()),
        ]
        sharded, common = save_preprocess({"model": model, "optimizer": states, **self._common()}, not self._checked)
        self._checked = True
        return SnapshotPlan(sources, sharded, common)

    def _common(self) -> dict[str, Any]:
        return {"schedule": self.optimizer.schedule.state_dict(), "updates": _updates(self.optimizer)}


def _sharded(stage: torch.nn.Module, *, stacked: bool = False) -> dict[str, Any]:
    """Return Megatron's sharded state dict of a stage, with keys for each layer or with the layers stacked."""
    return stage.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked})


def _is_stacked(folder: Path) -> bool:
    """Whether a checkpoint has all layers under one key."""
    layers = "decoder.layers."
    keys = read_metadata(folder).state_dict_metadata
    return any(key.startswith(layers) and not key.removeprefix(layers)[:1].isdigit() for key in keys)


def _without_absent_states(model: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Leave out of a stage's sharded state dict the extra states of layers that a checkpoint does not have.

    Which layers have one depends on who made them: transformer-engine's norms do, and ours do not. Without FP8 it holds
    nothing, and every layer takes None for it.

    Returns:
        The other entries, and the keys that were left out.
    """
    kept = read_metadata(folder).state_dict_metadata
    absent = [key for key, each in model.items() if isinstance(each, ShardedObject) and each.unique_key not in kept]
    return {key: each for key, each in model.items() if key not in absent}, absent


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


def _state_of(shard: _Shard, *, allocate: bool = False) -> dict[str, Tensor]:
    """Master parameter and moments of a shard, by name.

    Before the first update the moments are zeros that are not stored, because Adam initialises only what has no state;
    they are if they are to be allocated.
    """
    if shard.main is None:
        return {}
    state = shard.inner.optimizer.state[shard.main]
    if allocate:
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(shard.main.data))
    moments = {key: state[key] if key in state else torch.zeros_like(shard.main.data) for key in MOMENTS}
    return {MASTER: shard.main.data, **moments}


def _sharded_optimizer_state(
    model: dict[str, Any], optimizer: DistributedAdamW, fill: Any
) -> dict[str, dict[str, Any]]:
    """Sharded tensors of the optimizer's state, by parameter name and kind (master, exp_avg, exp_avg_sq).

    They are divided as the parameters are. `fill(parameter, shard)` makes the whole tensor of each kind.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model)
    by_parameter = {id(each.data): each for each in nested_values(sharded)}
    return {
        name: {
            key: make_sharded_optimizer_tensor(by_parameter[id(parameter)], whole, prefix=f"optimizer.{key}")
            for key, whole in fill(parameter, shard).items()
        }
        for name, parameter, shard in _shards(optimizer)
    }


def _empty_tensors(parameter: torch.nn.Parameter, _shard: _Shard) -> dict[str, Tensor]:
    """Make uninitialised tensors for a parameter's master and moments, into which a checkpoint is loaded."""
    return {key: torch.empty_like(parameter, dtype=torch.float32).detach() for key in (MASTER, *MOMENTS)}


def _meta_tensors(parameter: torch.nn.Parameter, _shard: _Shard) -> dict[str, Tensor]:
    """Make tensors of the same shapes on the meta device, where they take no memory."""
    return {key: torch.empty(parameter.shape, dtype=torch.float32, device="meta") for key in (MASTER, *MOMENTS)}


def _shards(optimizer: DistributedAdamW) -> Iterator[tuple[str, torch.nn.Parameter, _Shard]]:
    """Yield every trained parameter with its name and shard, in the same order on all data-parallel ranks."""
    for inner in optimizer.inner.chained_optimizers:
        trained = {parameter for buffer in inner.buffers for parameter in buffer.param_index_map}
        for chunk in inner.model_chunks:
            for name, parameter in chunk.named_parameters():
                if parameter in trained:
                    yield name, parameter, _Shard(inner, parameter)


# torch's Adam counts its updates in a tensor of each parameter, transformer-engine's and apex's in each group, where
# their first update creates the number. So both are set, and the one that the optimizer does not count stays behind.
def _set_updates(optimizer: DistributedAdamW, updates: int) -> None:
    """Let Adam continue from a number of updates."""
    for _, _, shard in _shards(optimizer):
        if shard.main is not None:
            shard.inner.optimizer.state[shard.main]["step"] = torch.tensor(float(updates))
            for group in shard.inner.optimizer.param_groups:
                group["step"] = updates


def _updates(optimizer: DistributedAdamW) -> int:
    """The number of updates that Adam has counted, which is the same for every parameter."""
    counts = [0]
    for _, _, shard in _shards(optimizer):
        if shard.main is not None:
            counts += [group.get("step", 0) for group in shard.inner.optimizer.param_groups]
            counts.append(shard.inner.optimizer.state.get(shard.main, {}).get("step", 0))
            break
    return max(map(int, counts))


@contextmanager
def _adapted_megatron() -> Iterator[None]:
    """Within, Megatron's checkpoint code works on this platform; the imports above load all that has to be adapted."""
    platform().adapt("megatron.core")
    with platform().cuda_tensor_names():
        yield
