"""The policy's weights on their ranks: read from a folder or a checkpoint, and given away. Training is `actor.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.policy.loading import load_stage
from clipo_megatron.policy.model.model import TORCH_DTYPE, build_stages, transformer_config
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.export import ExportPlan, export, plan_export
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import ModelSpec, read_config


class Policy:
    """One rank's part of the policy. Every method is collective: all ranks call it, in the same order.

    Args:
        config: of the run; model.path says which model it is.
        layout: of the ranks.
        weights: a checkpoint of that model to read them from; None: from model.path.

    Raises:
        ValueError: the layout divides experts as this machine's communication cannot.
        WeightsError: the folder cannot be used, or not in this layout.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, weights: Path | None = None):
        self.config, self.layout = config, layout
        self.spec = model_spec(read_config(hf_folder(config.model.path)))
        _check_experts(self.spec, layout)
        self.stages = layout.division.stages(self.spec.num_layers)
        self.transformer = transformer_config(self.spec, config.model, layout)
        dtype = TORCH_DTYPE[config.model.dtype]
        with platform().cuda_tensor_names():
            (self.stage,) = build_stages(self.spec, self.transformer, layout)
            self.stage.to(device=platform().device, dtype=dtype)
        load_stage(self.stage, str(weights or config.model.path), layout)
        # Names, shapes and owners of the Hugging Face tensors this policy exports.
        self.export_plan: ExportPlan = plan_export(self.spec, layout.division, dtype=dtype)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by Hugging Face name, whole, on every rank, bucket by bucket."""
        return export(self.export_plan, [dict(self.stage.named_parameters())], self.layout.holder)

    def offload(self) -> None:
        """Free what only training needs, for servers that take turns with this rank on its GPU: of weights, nothing."""

    def restore_memory(self) -> None:
        """Inverse of `offload`."""


def _check_experts(spec: ModelSpec, layout: Layout) -> None:
    division = layout.division
    if spec.experts is not None and division.ep > 1 and division.expert_tp > 1 and not platform().has_gpu:
        raise ValueError(
            f"experts over ep {division.ep} ranks cannot each be divided over etp {division.expert_tp} more on a CPU, "
            "whose communication knows no gathering of unequal parts; set layout.etp=1"
        )
