"""Folders of models: Hugging Face folders, and checkpoints with the Hugging Face files of their model in them.

The configurations of a run and of a model are both called config.json; `is_run_settings` tells them apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import ConfigProblem

_MOST_BYTES = 1 << 28  # of a JSON file; indexes and tokenizers of large models have tens of millions
# What a checkpoint's folder holds.
POLICY = "policy"  # the policy's weights, in Megatron's torch_dist
CRITIC = "critic"  # the value model's weights, if the run has one
HF_FILES = "hf"  # config.json, the tokenizer and other files that stood beside the source's weights


class ModelFileError(ValueError):
    """A file of a model cannot be read as what it should be; the message names it."""


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Raises:
        FileNotFoundError: there is none. ModelFileError: it is no file, cannot be read, or holds something else.
    """
    try:
        if file.exists() and not file.is_file():
            raise ModelFileError(f"{file} is no file")
        if (size := file.stat().st_size) > _MOST_BYTES:
            raise ModelFileError(f"{file} has {size} bytes, and no such file has more than {_MOST_BYTES}")
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{file} cannot be read: it is no valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{file} holds a {type(found).__name__}, not an object")
    return found


def foreign_links(folder: Path) -> Iterator[Path]:
    """The links in a model's folder that lead out of it, other than those of the hub's cache to its blobs.

    Weights are left out: nothing but tensors is read from them, and many a folder has them on another disk.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.name.endswith(".safetensors"):
            target = file.resolve()
            if not target.is_relative_to(home) and target.parent != blobs:
                yield file


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint that `clipo convert` or a training run has written."""
    return (Path(path) / POLICY / "metadata.json").is_file()


def hf_folder(path: str | os.PathLike[str]) -> Path:
    """The folder with a model's config.json and tokenizer."""
    return Path(path) / HF_FILES if is_checkpoint(path) else Path(path)


def hub_cache() -> Path:
    """The folder in which Hugging Face's libraries keep what they have downloaded."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def tokens_of(path: str | os.PathLike[str]) -> dict[int, str] | None:
    """The text of each token id in a model's tokenizer.json; None if there is no such file, or it cannot be read."""
    try:
        content = read_object(hf_folder(path) / "tokenizer.json")
        words = content["model"]["vocab"]
        pairs = words.items() if isinstance(words, dict) else ((word, index) for index, (word, _) in enumerate(words))
        found = {index: word for word, index in pairs} | {
            each["id"]: each["content"] for each in content.get("added_tokens", ())
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {index: word for index, word in found.items() if isinstance(index, int)}


def vocabulary_problem(path: str, policy: str) -> ConfigProblem | None:
    """What is wrong with the tokens of the folder that a critic starts from, since it reads the policy's token ids.

    Embeddings have to have one size. Tokenizers are compared where both folders have a tokenizer.json; a token that
    only one of them has is no contradiction.
    """
    sizes = [vocab_size(path), vocab_size(policy)]
    own, others = tokens_of(path) or {}, tokens_of(policy) or {}
    differing = min((token for token in own.keys() & others.keys() if own[token] != others[token]), default=None)
    if None not in sizes and sizes[0] != sizes[1]:
        reason = f"its vocab_size is {sizes[0]}, and that of model.path is {sizes[1]}"
    elif differing is not None:
        reason = f"its token {differing} is {own[differing]!r}, and that of model.path is {others[differing]!r}"
    else:
        return None
    remedy = "Choose a model with the policy's vocabulary, or null to start from the policy's weights"
    return ConfigProblem("critic.path", f"{reason}; it reads the policy's tokens", remedy, path)


def vocab_size(path: str) -> int | None:
    """The `vocab_size` of a model's config.json; None if that cannot be read, which loading the model reports."""
    try:
        return read_object(hf_folder(path) / "config.json").get("vocab_size")
    except (OSError, ValueError):
        return None


def is_run_settings(facts: Any) -> bool:
    """Whether the content of a config.json is a run's resolved configuration rather than a model's."""
    return isinstance(facts, dict) and "data" in facts and "train" in facts


def read_run_settings(file: Path) -> dict[str, Any] | None:
    """The settings in a run's config.json; None where there are none, or the file is something else."""
    try:
        settings = read_object(file)
    except (OSError, ValueError):
        return None
    return settings if is_run_settings(settings) else None
