"""Loads the tokenizer of a model, with its chat template."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipo_megatron.config.model_folder import read_object
from clipo_megatron.data.sources import DataError


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder on this machine. No code of the folder is run.

    Raises:
        DataError: the tokenizer cannot be loaded, or has no chat template that stands for itself.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise DataError(f"the tokenizer of model.path = {path} needs a package: {_first_line(error)}") from error
    except Exception as error:  # whatever a damaged file leads to, in several libraries
        if _has_own_code(Path(path)):
            raise DataError(
                f"the tokenizer of model.path = {path} is code that comes with the model (auto_map in its "
                "tokenizer_config.json), and no code of a model is run. Convert it to a tokenizer.json that the "
                "tokenizers library reads, and remove auto_map."
            ) from error
        raise DataError(
            f"the tokenizer of model.path = {path} cannot be loaded: {_first_line(error)}. Fetch the folder's "
            "tokenizer files again."
        ) from error
    template = tokenizer.chat_template
    if not template:
        raise DataError(f"the tokenizer of model.path = {path} has no chat template. {_template_remedy(Path(path))}")
    if isinstance(template, dict) and "default" not in template:
        raise DataError(
            f"the tokenizer of model.path = {path} has the chat templates {', '.join(sorted(template))}, and none of "
            "them is the default. Write the one to use into chat_template.jinja."
        )
    return tokenizer


@contextmanager
def without_torch() -> Iterator[None]:
    """A context in which transformers is used as where there is no torch, which saves seconds: tokenizers need none.

    It is for processes that compute nothing. transformers is forgotten at the end, so that it can be imported again.
    Nothing is different where torch or transformers has been imported before.
    """
    if {"torch", "transformers"} & set(sys.modules):
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    try:
        yield
    finally:
        del sys.modules["torch"]
        for name in [each for each in sys.modules if each.partition(".")[0] == "transformers"]:
            del sys.modules[name]


def _has_own_code(folder: Path) -> bool:
    try:
        return "auto_map" in read_object(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _template_remedy(folder: Path) -> str:
    """How a folder gets a chat template that tokenizers read."""
    if (folder / "chat_template.json").is_file():
        return (
            "Tokenizers do not read its chat_template.json, which is for models that see pictures: write the text that "
            "stands there under chat_template into a file chat_template.jinja."
        )
    return "Use an instruct model, or add a chat_template.jinja to the folder."
