"""The tokenizer of a model, and rows as prompts: chat template, token ids, and a limit on their length."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipo_megatron.data.preparing import PromptSettings, write_prompts
from clipo_megatron.data.prompt_table import PromptTable
from clipo_megatron.data.rendering import ChatRenderer, Messages
from clipo_megatron.data.sources import DataError, Row
from clipo_megatron.flow import Prompt

__all__ = ["ChatRenderer", "Messages", "PromptSet", "load_tokenizer", "tokenize", "without_torch"]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts that fit, and the number of those that were too long, in all and by source."""

    prompts: Sequence[Prompt]
    too_long: int
    too_long_by_source: Mapping[str, int] = field(default_factory=dict)


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


def tokenize(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    system_prompt: str | None,
    max_prompt_tokens: int,
    template_options: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Apply the chat template with its generation prompt, and leave out prompts of more than `max_prompt_tokens`.

    Args:
        rows: the problems.
        tokenizer: a Hugging Face tokenizer with a chat template.
        system_prompt: None keeps a row's own system turn, or else the template's default; text replaces both; ""
            removes both.
        max_prompt_tokens: the limit.
        template_options: what the template reads beside the turns.

    Raises:
        DataError: there are rows and none fits, or the template cannot render a row.
    """
    rows = list(rows)
    by_id = {row.id: row for row in rows}
    with tempfile.TemporaryFile() as file:
        settings = PromptSettings(system_prompt, max_prompt_tokens, template_options or {})
        write_prompts(rows, tokenizer, settings, file)
        table = PromptTable(file, reread=lambda name: by_id)
    return PromptSet(table, table.too_long, table.too_long_by_source)
