"""Weights as a Hugging Face folder that a server can read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipo_megatron.rollout.engine import EngineError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_TIED = "lm_head.weight"  # may be absent, or there without need


def write_folder(folder: Path, tensors: Iterable[tuple[str, Tensor]], model: Path | None) -> None:
    """Write tensors as safetensors, and beside them everything of `model` but its own weights.

    Raises:
        EngineError: names or shapes are not those of `model`'s weights, or came twice; all are listed.
    """
    expected = {} if model is None else _shapes(model)
    found: dict[str, Tensor] = {}
    problems = []
    for name, tensor in tensors:
        shape = list(tensor.shape)
        if name in found:
            problems.append(f"{name} came twice")
        elif expected and name not in expected and name != _TIED:
            problems.append(f"{name} {shape} is unknown to the model")
        elif expected.get(name, shape) != shape:
            problems.append(f"{name} has shape {shape}, the model needs {expected[name]}")
        found[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    problems += [f"{name} never came" for name in expected if name not in found and name != _TIED]
    if problems:
        raise EngineError(
            f"Weights do not fit the model ({len(problems)} problems): {'; '.join(problems)}. Check that they were "
            "exported from the same architecture as the folder's config.json."
        )
    if model is not None:
        for path in model.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, folder / path.name)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def _shapes(model: Path) -> dict[str, list[int]]:
    """Name -> shape of the weights in a folder; {} where it has no safetensors."""
    shapes = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            shapes |= {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes
