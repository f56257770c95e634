"""A model's weights and the files beside them, in a Hugging Face folder or in a checkpoint alike."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

from clipo_megatron.config.model_folder import HF_FILES, POLICY, hf_folder, is_checkpoint
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.reader import INDEX, HFReader
from clipo_megatron.weights.formats.torch_dist_reader import TorchDistReader
from clipo_megatron.weights.spec import ModelSpec, read_config

LAYOUT = "weights.json"  # of a checkpoint's hf/: how the source's weights were divided over files
# Weights, in whatever format, and what tools leave in a folder. Everything else in it is kept.
_NOT_KEPT = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json", ".*")
_LARGEST_KEPT = 64 * 1024**2

Reader = HFReader | TorchDistReader


def open_weights(path: str | Path, spec: ModelSpec | None = None, *, master: bool = False) -> Reader:
    """The tensors of a model by Hugging Face name, read as they are asked for; close it after use.

    Args:
        path: a Hugging Face folder, or a checkpoint of conversion or training.
        spec: of the model; read from its config.json if not given.
        master: the fp32 masters of a training checkpoint in place of its parameters.

    Raises:
        CheckpointError: neither, or damaged. UnsupportedModel: see `model_spec`.
    """
    if not is_checkpoint(path):
        return HFReader(path)
    return TorchDistReader(Path(path) / POLICY, spec or model_spec(read_config(hf_folder(path))), master=master)


def files_beside(path: str | Path) -> dict[str, bytes]:
    """What a checkpoint keeps of a model besides its weights, by file name: the contents of its `hf/`.

    Small: config, generation config, tokenizer, documents; and LAYOUT, with the headers of the weights' files.
    """
    folder = hf_folder(path)
    kept = {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.stat().st_size <= _LARGEST_KEPT
        and not any(fnmatchcase(file.name, pattern) for pattern in _NOT_KEPT)
    }
    if not is_checkpoint(path):
        kept[LAYOUT] = json.dumps(_layout_of(folder)).encode()
    return kept


def _layout_of(folder: Path) -> dict[str, object]:
    with HFReader(folder) as reader:
        headers = {name: file.header.text for name, file in reader.files.items()}
    index = folder / INDEX
    many = list(headers) != ["model.safetensors"] and index.is_file()
    return {"headers": headers, "index": index.read_text(encoding="utf-8") if many else None}


__all__ = ["HF_FILES", "LAYOUT", "Reader", "files_beside", "open_weights"]
