"""Turns into the text that a policy reads: the chat template, with the run's setting of the system prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipo_megatron.data.sources import DataError
from clipo_megatron.data.template_options import check_template_options
from clipo_megatron.data.templates import TemplateRefusal, render_template

Messages = Sequence[Mapping[str, str]]
Rendered = tuple[str, tuple[Mapping[str, str], ...]]  # the text, and the turns that it contains

_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "first"}],
    [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}],
)


class ChatRenderer:
    """Renders turns by the chat template, with the run's setting of the system prompt.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        system_prompt: None keeps a row's own system turn, or else the template's default; text replaces both; ""
            removes both.
        options: what the template reads beside the turns (model.template_options).

    Raises:
        DataError: the template does not read one of the options, or reads it as something else, or leaves out the
            questions.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None, options: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.options = dict(options or {})
        check_template_options(tokenizer, self.options)
        self._refuse_deaf_template()
        self._before: dict[int, str | TemplateRefusal] = {}  # the text of each probe by itself

    def _refuse_deaf_template(self) -> None:
        """Refuse a template that makes the same text of different questions: the policy would never read one."""
        try:
            texts = self._apply_all([[{"role": "user", "content": each}] for each in ("one", "two")])
        except TemplateRefusal:  # rendering the prompts reports it in words
            return
        if texts[0] == texts[1]:
            raise DataError(
                f"the chat template leaves out what the user says: it makes {texts[0][:80]!r} of any question. Correct "
                "the model's chat_template.jinja or tokenizer_config.json."
            )

    def render(self, messages: Messages) -> Rendered:
        """The text for the model, generation prompt included, and the turns that it contains.

        Raises:
            DataError: the template refuses the turns.
        """
        turns = self._turns(messages)
        if self.system_prompt == "":
            return self._without_system_prompt(turns), turns
        return self._apply(turns, open_turn=True), turns

    def render_all(self, conversations: Sequence[Messages]) -> list[Rendered]:
        """What `render` gives for each of several conversations, in a fraction of the time.

        Raises:
            Exception: one of them cannot be rendered; `render` says why.
        """
        turns = [self._turns(messages) for messages in conversations]
        texts = self._all_without_system_prompt(turns) if self.system_prompt == "" else self._apply_all(turns)
        return list(zip(texts, turns, strict=True))

    def _turns(self, messages: Messages) -> tuple[Mapping[str, str], ...]:
        if self.system_prompt is None:
            return tuple(messages)
        turns = tuple(turn for turn in messages if turn["role"] != "system")
        return ({"role": "system", "content": self.system_prompt}, *turns) if self.system_prompt else turns

    def _without_system_prompt(self, messages: Messages) -> str:
        """The text without any system prompt.

        Templates write their default system prompt before the first turn only. So the turns are rendered after another
        exchange, and the text of that exchange is removed.
        """
        for number, probe in enumerate(_PROBES):
            try:
                before = self._probe(number)
                both = self._apply([*probe, *messages], open_turn=True)
            except TemplateRefusal:
                continue  # a template that insists on alternating turns refuses the first probe
            if not _follows(both, before, messages):
                continue
            text, start = both[len(before) :], self.tokenizer.bos_token or ""
            opens = start and self._apply(messages, open_turn=True).startswith(start)
            return start + text if opens and not text.startswith(start) else text
        raise DataError(
            "model.system_prompt = '': this chat template cannot be rendered without a system prompt. "
            "Write one out, or leave it null for the template's own."
        )

    def _all_without_system_prompt(self, conversations: Sequence[Messages]) -> list[str]:
        """As `_without_system_prompt`, all at once where the first probe serves them all."""
        try:
            before = self._probe(0)
            many = self._apply_all([[*_PROBES[0], *messages] for messages in conversations])
        except TemplateRefusal:  # the template wants another probe for some of them
            return [self._without_system_prompt(messages) for messages in conversations]
        if not all(_follows(both, before, messages) for both, messages in zip(many, conversations, strict=True)):
            return [self._without_system_prompt(messages) for messages in conversations]
        texts, start = [both[len(before) :] for both in many], self.tokenizer.bos_token or ""
        unopened = [index for index, text in enumerate(texts) if start and not text.startswith(start)]
        plain = self._apply_all([conversations[index] for index in unopened]) if unopened else []
        for index, text in zip(unopened, plain, strict=True):
            if text.startswith(start):
                texts[index] = start + texts[index]
        return texts

    def _probe(self, number: int) -> str:
        """The text of a probe by itself, which is rendered once; a DataError if the template refuses it."""
        if number not in self._before:
            try:
                self._before[number] = self._apply(_PROBES[number], open_turn=False)
            except TemplateRefusal as error:
                self._before[number] = error
        found = self._before[number]
        if isinstance(found, TemplateRefusal):
            raise found
        return found

    def _apply_all(self, conversations: Sequence[Messages]) -> list[str]:
        return render_template(self.tokenizer, conversations, self.options, open_turn=True)

    def _apply(self, messages: Messages, *, open_turn: bool) -> str:
        return render_template(self.tokenizer, [messages], self.options, open_turn=open_turn)[0]


def _follows(both: str, before: str, messages: Messages) -> bool:
    """Whether the text of two exchanges is the first one's text, with the second one's behind it."""
    return both.startswith(before) and messages[0]["content"].strip() in both[len(before) :]
