"""The weights of a Hugging Face folder or a checkpoint into one rank's stage."""

from __future__ import annotations

from clipo_megatron.policy.model.model import PolicyStage
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.weights.coverage import check_tensors, match
from clipo_megatron.weights.families import entries
from clipo_megatron.weights.formats.source import open_weights
from clipo_megatron.weights.load import load_into

_LM_HEAD = "output_layer.weight"


def load_stage(stage: PolicyStage, folder: str, layout: Layout) -> None:
    """Fill every parameter of a stage that the folder has weights for: all, but a value head.

    Raises:
        WeightsError: the folder cannot be used, or not in this layout.
    """
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
        parameters[name].tensor_model_parallel = entry.kind.sharded  # type: ignore[attr-defined]
