"""Rows as prompts, without a file of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from clipo_megatron.data.preparing import PromptSettings, write_prompts
from clipo_megatron.data.prompt_table import PromptTable
from clipo_megatron.data.sources import Row


def tokenize(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    system_prompt: str | None,
    max_prompt_tokens: int,
    template_options: Mapping[str, Any] | None = None,
) -> PromptTable:
    """The prompts of rows as a run makes them; raises what `write_prompts` does."""
    rows = list(rows)
    by_id = {row.id: row for row in rows}
    with tempfile.TemporaryFile() as file:
        settings = PromptSettings(system_prompt, max_prompt_tokens, template_options or {})
        write_prompts(rows, tokenizer, settings, file)
        return PromptTable(file, reread=lambda name: by_id)
