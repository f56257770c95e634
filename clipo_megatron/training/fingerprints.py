"""Fingerprints of what a run's settings stand for, by which a resumed run notices that something else stands there now.

model       the files of its weights: names, sizes, and some of their bytes
tokenizer   the token of each id
template    the text of the chat template
train, eval the number of problems, and digests of what they ask, of that with gold answers, and of their tokens

They cost less than a second for 60,000 problems: nothing is read or rendered again.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from clipo_megatron.config.model_folder import POLICY, hf_folder, is_checkpoint
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.prompt_table import PromptTable

_SAMPLES, _SAMPLE_BYTES = 4, 4096  # places in each file of weights that are compared, and how much there


def fingerprints(
    config: RunConfig, tokenizer: Any, *, train: PromptTable, held_out: PromptTable | None
) -> dict[str, Any]:
    """The fingerprints of a run, plain values."""
    return {
        "model": {"path": config.model.path, "digest": weights_digest(Path(config.model.path))},
        "tokenizer": _digest(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "template": _digest(json.dumps(tokenizer.chat_template, sort_keys=True)),
        "train": train.fingerprint(),
        "eval": held_out.fingerprint() if held_out is not None else None,
    }


def weights_digest(folder: Path) -> str:
    """A digest of the names and sizes of a model's files of weights, and of some bytes of each.

    Weights of the same shapes differ nearly everywhere, so that a few places tell two models apart.
    """
    checkpoint = is_checkpoint(folder)
    place, pattern = (folder / POLICY, "*.distcp") if checkpoint else (hf_folder(folder), "*.safetensors")
    digest = blake2b(digest_size=8)
    for file in sorted(place.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            for number in range(_SAMPLES + 1):
                opened.seek(max(0, size - _SAMPLE_BYTES) * number // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
