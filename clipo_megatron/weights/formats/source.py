"""The weights and the sidecar files of a model, whether it is a Hugging Face folder or a checkpoint."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Union

from clipo_megatron.config.model_folder import POLICY, foreign_links, hf_folder, is_checkpoint
from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.reader import INDEX, HFReader
from clipo_megatron.weights.spec import ModelSpec, read_config

if TYPE_CHECKING:
    from clipo_megatron.weights.formats.torch_dist_reader import TorchDistReader

SOURCE_HEADERS = "weights.json"  # in a checkpoint's hf/: how the source's weights were divided over files
# Weights in any format, and what tools leave in a folder. Everything else in it is a sidecar file.
_NO_SIDECAR = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json", ".*")
_LARGEST_SIDECAR = 64 * 1024**2

Reader = Union[HFReader, "TorchDistReader"]


def open_weights(path: str | Path, spec: ModelSpec | None = None) -> Reader:
    """Open the tensors of a model by Hugging Face name; they are read as they are asked for. Close it after use.

    Args:
        path: a Hugging Face folder, or a checkpoint of conversion or training.
        spec: of the model; read from its config.json if not given.

    Raises:
        WeightsFolderError: the path is neither, or damaged. UnsupportedModel: see `model_spec`.
    """
    if not is_checkpoint(path):
        return HFReader(path)
    from clipo_megatron.weights.formats.torch_dist_reader import TorchDistReader  # imports torch

    return TorchDistReader(Path(path) / POLICY, spec or model_spec(read_config(hf_folder(path))))


def sidecar_files(path: str | Path) -> dict[str, bytes]:
    """Read what a checkpoint keeps of a model besides its weights, by file name: the contents of its `hf/`.

    These are small files: config, generation config, tokenizer, documents; and SOURCE_HEADERS, with the headers of the
    files of weights.
    """
    folder = hf_folder(path)
    if not folder.is_dir():
        raise WeightsFolderError(f"{folder} is no folder. Give the folder of a Hugging Face model")
    if foreign := next(foreign_links(folder), None):
        raise WeightsFolderError(
            f"{foreign} is a link to {os.readlink(foreign)}, outside the model's folder, and would be copied into the "
            "checkpoint. Replace the link by its file, if it belongs to the model"
        )
    kept = {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.stat().st_size <= _LARGEST_SIDECAR
        and not any(fnmatchcase(file.name, pattern) for pattern in _NO_SIDECAR)
    }
    if not is_checkpoint(path):
        kept[SOURCE_HEADERS] = json.dumps(_headers_of(folder)).encode()
    return kept


def _headers_of(folder: Path) -> dict[str, object]:
    with HFReader(folder) as reader:
        headers = {name: file.header.text for name, file in reader.files.items()}
    index = folder / INDEX
    many = list(headers) != ["model.safetensors"] and index.is_file()
    return {"headers": headers, "index": index.read_text(encoding="utf-8") if many else None}
