"""Turns rows into prompts: chat template, token ids, and a limit on their length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipo_megatron.config.schema import SourceConfig
from clipo_megatron.data.asked import asked_forms, opens_thinking
from clipo_megatron.data.sources import DataError, Row, read_all
from clipo_megatron.flow import Prompt

Messages = Sequence[Mapping[str, str]]

_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "first"}],
    [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}],
)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts that fit, the number of those that were too long, and the data sources of both."""

    prompts: list[Prompt]
    too_long: int
    data_sources: frozenset[str] = frozenset()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder on this machine.

    Raises:
        DataError: the tokenizer cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"the tokenizer of model.path = {path} cannot be loaded: {reason}") from error
    if not tokenizer.chat_template:
        raise DataError(f"the tokenizer of model.path = {path} has no chat template. Add a chat_template.jinja to it.")
    return tokenizer


def load_prompts(
    sources: Sequence[SourceConfig], tokenizer: Any, *, system_prompt: str | None, max_prompt_tokens: int
) -> PromptSet:
    """Read all sources and tokenize them; see `tokenize`.

    Raises:
        DataError: a source cannot be read, or no prompt fits.
    """
    return tokenize(read_all(sources), tokenizer, system_prompt=system_prompt, max_prompt_tokens=max_prompt_tokens)


def tokenize(rows: Sequence[Row], tokenizer: Any, *, system_prompt: str | None, max_prompt_tokens: int) -> PromptSet:
    """Apply the chat template with its generation prompt, and leave out prompts of more than `max_prompt_tokens`.

    Args:
        rows: the problems.
        tokenizer: a Hugging Face tokenizer with a chat template.
        system_prompt: None keeps a row's own system turn, or else the template's default; text replaces both; ""
            removes both.
        max_prompt_tokens: the limit.

    Raises:
        DataError: there are rows and none fits, or the template cannot render a row.
    """
    renderer = ChatRenderer(tokenizer, system_prompt)
    texts, turns = [], []
    for row in rows:
        try:
            text, messages = renderer.render(row.messages)
        except DataError as error:
            raise DataError(f"prompt {row.id}: {error}") from error
        texts.append(text)
        turns.append(messages)
    # The template has written the special tokens already.
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    prompts = [
        Prompt(
            id=row.id,
            messages=messages,
            tokens=torch.tensor(tokens, dtype=torch.int64),
            data_source=row.data_source,
            ground_truth=row.ground_truth,
            extra=row.extra,
            forms=asked_forms(text),
            thinking=opens_thinking(text),
        )
        for row, messages, text, tokens in zip(rows, turns, texts, ids, strict=True)
        if len(tokens) <= max_prompt_tokens
    ]
    if rows and not prompts:
        shortest = min(map(len, ids))
        raise DataError(
            f"data.max_prompt_tokens = {max_prompt_tokens} leaves out all {len(rows)} prompts: the shortest has "
            f"{shortest} tokens. Raise it."
        )
    return PromptSet(prompts, len(rows) - len(prompts), frozenset(row.data_source for row in rows))


class ChatRenderer:
    """Renders turns by the chat template, with the run's setting of the system prompt."""

    def __init__(self, tokenizer: Any, system_prompt: str | None):
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt

    def render(self, messages: Messages) -> tuple[str, tuple[Mapping[str, str], ...]]:
        """The text for the model, generation prompt included, and the turns that it contains.

        Raises:
            DataError: the template refuses the turns.
        """
        if self.system_prompt is None:
            return self._apply(messages, open_turn=True), tuple(messages)
        turns = tuple(turn for turn in messages if turn["role"] != "system")
        if self.system_prompt:
            turns = ({"role": "system", "content": self.system_prompt}, *turns)
            return self._apply(turns, open_turn=True), turns
        return self._without_system_prompt(turns), turns

    def _without_system_prompt(self, messages: Messages) -> str:
        """The text without any system prompt.

        Templates write their default system prompt before the first turn only. So the turns are rendered after another
        exchange, and the text of that exchange is removed.
        """
        for probe in _PROBES:
            try:
                before = self._apply(probe, open_turn=False)
                both = self._apply([*probe, *messages], open_turn=True)
            except DataError:
                continue  # a template that insists on alternating turns refuses the first probe
            if not both.startswith(before) or messages[0]["content"].strip() not in both[len(before) :]:
                continue
            text, start = both[len(before) :], self.tokenizer.bos_token or ""
            opens = start and self._apply(messages, open_turn=True).startswith(start)
            return start + text if opens and not text.startswith(start) else text
        raise DataError(
            "model.system_prompt = '': this chat template cannot be rendered without a system prompt. "
            "Write one out, or leave it null for the template's own."
        )

    def _apply(self, messages: Messages, *, open_turn: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=open_turn
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the turns: {error}. Change the row or the template.") from error
