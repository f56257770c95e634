"""Folders of tiny models, one of each family that the local engine computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_llama, tiny_mistral, tiny_phi3, tiny_qwen2, tiny_qwen3

FAMILIES = {
    "llama": (tiny_llama, {"tied": False}),
    "llama-tied": (tiny_llama, {"tied": True}),
    "qwen2": (tiny_qwen2, {"tied": True}),
    "qwen2-untied": (tiny_qwen2, {"tied": False}),
    "qwen3": (tiny_qwen3, {"tied": False}),
    "mistral": (tiny_mistral, {"window": 17}),  # shorter than what chat prompts share, and than prompts without it
    "phi3": (tiny_phi3, {"window": 7}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name, **options) for name, (make, options) in FAMILIES.items()}


IN_SHORT = ("llama-tied", "qwen2-untied", "qwen3", "mistral")  # of which `make test` has every test


@pytest.fixture(params=[pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.full) for name in FAMILIES])
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture
def llama(folders) -> Path:
    return folders["llama"]
