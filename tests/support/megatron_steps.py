"""Steps on ranks with Megatron's own checkpoints: fill a model, save it, load it in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from clipo_megatron.config.schema import DType, LayoutConfig, ModelConfig
from clipo_megatron.policy import parallel
from clipo_megatron.policy.checkpoint import state as _writers  # noqa: F401  imports what `adapt` is to reach
from clipo_megatron.policy.model.model import PolicyStage, build_stages, transformer_config
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.reader import HFReader
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.spec import read_config


def chunks(folder: Path, config: LayoutConfig, vpp: int = 1, stacked: bool = False) -> list[PolicyStage]:
    """Build this rank's chunks of the model of `folder`, in fp32 and full of NaN; collective."""
    layout = parallel.initialize(config, seed=0, vpp=vpp)
    spec = model_spec(read_config(folder))
    transformer = transformer_config(spec, ModelConfig(path="", dtype=DType.fp32), layout)
    if stacked and spec.experts is not None:
        transformer.moe_layer_freq = 1  # the same for this model; given a list, Megatron does not stack its layers
    with platform().cuda_tensor_names():
        stages = build_stages(spec, transformer, layout)
    with torch.no_grad():
        for stage in stages:
            for parameter in stage.parameters():
                parameter.fill_(torch.nan)
    return stages


def sharded(stages: list[PolicyStage], *, stacked: bool = False) -> dict[str, Any]:
    """The chunks' sharded state as Megatron-LM names it: "model", or "model0", "model1"."""
    metadata = {"non_homogeneous_layers": not stacked}
    names = ["model"] if len(stages) == 1 else [f"model{number}" for number in range(len(stages))]
    return {name: stage.sharded_state_dict(metadata=metadata) for name, stage in zip(names, stages, strict=True)}


def save_from_hf(folder: Path, target: Path, config: LayoutConfig, vpp: int = 1, stacked: bool = False) -> None:
    """Load a Hugging Face folder into a model and save that as torch_dist at `target`; collective."""
    stages = chunks(folder, config, vpp, stacked)
    with HFReader(folder) as reader:
        for stage in stages:
            at = stage.layout.coordinates
            load_into(stage.named_parameters(), entries(stage.spec, stage.place, at), reader, at)
    _save(stages, target, stacked)


def relay(
    folder: Path, source: Path, target: Path, config: LayoutConfig, vpp: int = 1, stacked: bool = False
) -> list[int]:
    """Load torch_dist `source` into a model in a layout under Megatron's default strictness, and save it to `target`.

    Returns:
        How many parameters each of this rank's chunks has; none of them holds a NaN.
    """
    stages = chunks(folder, config, vpp, stacked)
    with _megatron_here():
        loaded = dist_checkpointing.load(sharded(stages, stacked=stacked), str(source))
    for stage, state in zip(stages, (loaded[name] for name in sorted(loaded)), strict=True):
        stage.load_state_dict(state)
        names = [name for name, parameter in stage.named_parameters() if not bool(parameter.isfinite().all())]
        assert names == [], f"not filled from {source}: {names}"
    _save(stages, target, stacked)
    return [len(list(stage.parameters())) for stage in stages]


def left_over(folder: Path, source: Path, config: LayoutConfig) -> tuple[set[str], set[str]]:
    """Return the keys of torch_dist `source` that a model does not ask for, and those that are missing; collective.

    Megatron calls the first "missing" and the second "unexpected".
    """
    stages = chunks(folder, config)
    with _megatron_here():
        _, unasked, absent = dist_checkpointing.load(sharded(stages), str(source), strict=StrictHandling.RETURN_ALL)
    return unasked, absent


def _save(stages: list[PolicyStage], target: Path, stacked: bool) -> None:
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    with _megatron_here():
        dist_checkpointing.save(sharded(stages, stacked=stacked), str(target))


def _megatron_here() -> Any:
    platform().adapt("megatron.core")
    return platform().cuda_tensor_names()
