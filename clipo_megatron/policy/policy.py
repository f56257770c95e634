"""The policy's weights on their ranks: loaded from a folder or a checkpoint, and exported. `actor.py` trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.policy.model.model import TORCH_DTYPE, PolicyStage, transformer_config, transformer_engine_usable
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.coverage import check_tensors, match
from clipo_megatron.weights.export import ExportPlan, export, plan_export
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.source import open_weights
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.spec import ModelSpec, read_config

_LM_HEAD = "output_layer.weight"
Stage = TypeVar("Stage", bound=PolicyStage)


class Policy:
    """One rank's part of the policy. Every method is collective: all ranks call it, in the same order.

    Args:
        config: the run's configuration; model.path says which model it is.
        layout: this rank's place in the parallel layout.
        weights: a checkpoint of that model to read the weights from; None: from model.path.

    Raises:
        ConfigError: the section `megatron` has fields that Megatron refuses, or that need what is not here.
        ValueError: the layout divides experts in a way that this machine's communication cannot.
        WeightsError: the folder cannot be used, or not in this layout.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, weights: Path | None = None):
        self.config, self.layout = config, layout
        self.stage = loaded_stage(PolicyStage, config.model.path, config, layout, weights=weights)
        self.spec = self.stage.spec
        # Names, shapes and owners of the Hugging Face tensors that this policy exports.
        self.export_plan: ExportPlan = plan_export(self.spec, layout.division, dtype=TORCH_DTYPE[config.model.dtype])

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by Hugging Face name, whole, on every rank, bucket by bucket."""
        return export(self.export_plan, [dict(self.stage.named_parameters())], self.layout.holder)

    def offload(self) -> None:
        """Free the memory that only training needs; a policy that is not trained has none."""

    def onload(self) -> None:
        """Bring back what `offload` freed."""


def loaded_stage(
    build: Callable[[ModelSpec, TransformerConfig, Layout], Stage],
    folder: str,
    config: RunConfig,
    layout: Layout,
    *,
    weights: Path | None = None,
) -> Stage:
    """Build this rank's pipeline stage of the model in a Hugging Face folder or a checkpoint, and load its weights.

    They come from `folder`, or from another checkpoint of the model, `weights`. Raises what `Policy` does.
    """
    spec = model_spec(read_config(hf_folder(folder)))
    _check_experts(spec, layout)
    check_quantized(config.megatron)
    with platform().cuda_tensor_names():
        stage = build(spec, transformer_config(spec, config.model, layout, config.megatron), layout)
        stage.to(device=platform().device, dtype=TORCH_DTYPE[config.model.dtype])
    _load(stage, str(weights or folder), layout)
    return stage


def check_quantized(megatron: Mapping[str, Any]) -> None:
    """Refuse products of 8- and 4-bit factors where there are no layers that compute them.

    Raises:
        ConfigError: transformer-engine cannot be used here.
    """
    for name in ("fp8", "fp4"):
        if megatron.get(name) is not None and not transformer_engine_usable():
            raise ConfigError(
                f"megatron.{name} = {megatron[name]}: only transformer-engine's layers compute such products, and it "
                "cannot be used on this machine. Install it on one with GPUs, or remove the field."
            )


def _check_experts(spec: ModelSpec, layout: Layout) -> None:
    division = layout.division
    if spec.experts is not None and division.ep > 1 and division.expert_tp > 1 and not platform().has_gpu:
        raise ValueError(
            f"layout.etp = {division.expert_tp}: experts over layout.ep = {division.ep} ranks cannot be divided "
            "further on a CPU, whose collectives do not gather unequal parts; set layout.etp=1"
        )


def _load(stage: PolicyStage, folder: str, layout: Layout) -> None:
    """Fill every parameter of a stage but a value head, which no folder has."""
    at = layout.coordinates
    mapping = entries(stage.spec, stage.place, at)
    parameters = dict(stage.named_parameters())
    if not stage.has_lm_head:
        mapping = [entry for entry in mapping if _LM_HEAD not in entry.megatron]
        parameters = {name: each for name, each in parameters.items() if name not in stage.own_parameters}
    with open_weights(folder, stage.spec) as reader:
        if layout.rank == 0:
            check_tensors(reader, stage.spec)
        load_into(parameters.items(), mapping, reader, at)
    # Megatron sets this while it initialises weights at random, which we leave out; without it the gradient norm would
    # count the shards of one rank only.
    for name, entry in match(parameters, mapping, at):
        parameters[name].tensor_model_parallel = entry.sharding.sharded  # type: ignore[attr-defined]
