"""What a model's path may be: a Hugging Face folder, or a checkpoint that has its Hugging Face files in it.

A run's output folder keeps its configuration under the name that a model's has, so `is_run_settings` tells them apart.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

POLICY = "policy"  # of a checkpoint: the weights, in Megatron's torch_dist
CRITIC = "critic"  # of a checkpoint: those of a value model, if the run has one
HF_FILES = "hf"  # of a checkpoint: config.json, tokenizer and whatever else stood beside the weights


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint, of conversion or of training."""
    return (Path(path) / POLICY / "metadata.json").is_file()


def hf_folder(path: str | os.PathLike[str]) -> Path:
    """Where a model's config.json and tokenizer are."""
    return Path(path) / HF_FILES if is_checkpoint(path) else Path(path)


def tokens_of(path: str | os.PathLike[str]) -> dict[int, str] | None:
    """Text of each token id, as a model's tokenizer.json has it; None where there is no such file that can be read."""
    try:
        content = json.loads((hf_folder(path) / "tokenizer.json").read_text(encoding="utf-8"))
        words = content["model"]["vocab"]
        pairs = words.items() if isinstance(words, dict) else ((word, index) for index, (word, _) in enumerate(words))
        return {index: word for word, index in pairs} | {
            each["id"]: each["content"] for each in content.get("added_tokens", ())
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_run_settings(facts: Any) -> bool:
    """Whether what a config.json holds is a run's resolved configuration, and not a model's."""
    return isinstance(facts, dict) and "data" in facts and "train" in facts
