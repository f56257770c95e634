"""Writes weights as a Hugging Face folder that a server can load."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipo_megatron.config.model_folder import foreign_links
from clipo_megatron.rollout.engine import EngineError

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_TIED = "lm_head.weight"  # a model with tied embeddings may have it or lack it


def write_folder(folder: Path, tensors: Iterable[tuple[str, Tensor]], model: Path | None) -> None:
    """Write tensors as safetensors, together with the sidecar files of the folder `model`, if given.

    Raises:
        EngineError: lists all names and shapes that are unknown to `model`, missing or duplicated.
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
        copy_sidecar_files(model, folder)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def copy_sidecar_files(model: Path, folder: Path) -> None:
    """Copy everything in a model's folder but its weights: config.json, the tokenizer and the like.

    Raises:
        EngineError: one of them is a link to a file elsewhere, which may be nobody's business.
    """
    if foreign := next(foreign_links(model), None):
        raise EngineError(f"{foreign} is a link out of the model's folder. Replace the link by its file.")
    for path in sorted(model.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, folder / path.name)


def _shapes(model: Path) -> dict[str, list[int]]:
    """Maps the names of a folder's weights to their shapes; empty if it has no safetensors."""
    shapes = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            shapes |= {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes
