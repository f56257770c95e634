"""A model's weights and the files beside them, in a Hugging Face folder or in a checkpoint alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from clipo_megatron.config.model_folder import HF_FILES, POLICY, hf_folder, is_checkpoint
from clipo_megatron.files import crc32
from clipo_megatron.weights.errors import CheckpointError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.reader import INDEX, HFReader
from clipo_megatron.weights.spec import ModelSpec, read_config
from clipo_megatron.weights.torch_dist_reader import TorchDistReader

MANIFEST = "manifest.json"
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


def manifest_defects(path: str | Path, *, contents: bool = True) -> list[str]:
    """What a checkpoint's files are not as its manifest says, a sentence each; [] for a sound checkpoint.

    Args:
        path: the checkpoint.
        contents: compare the bytes, by CRC-32; else only names and sizes.
    """
    folder = Path(path)
    try:
        written = manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    return [defect for name, entry in written.items() if (defect := _defect(folder / name, entry, contents))]


def manifest(folder: Path) -> Mapping[str, Mapping[str, int]]:
    """Size ("bytes") and "crc32" of every file of a checkpoint, by name.

    Raises:
        CheckpointError: it has no manifest, so it is no complete checkpoint, or the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: {"bytes": int(entry["bytes"]), "crc32": int(entry["crc32"])} for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is no complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _defect(file: Path, entry: Mapping[str, int], contents: bool) -> str:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file} has {size} bytes, {entry['bytes']} were written"
        if contents and crc32(file) != entry["crc32"]:
            return f"the bytes of {file} are not those that were written"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return ""


__all__ = ["HF_FILES", "LAYOUT", "MANIFEST", "Reader", "files_beside", "manifest_defects", "open_weights"]
