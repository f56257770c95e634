"""Which tokens end a response: those that transformers would stop at, the same for every engine.

transformers takes `eos_token_id` from generation_config.json; where that names none, from config.json, and there from
the model itself before the text model inside it. The tokenizer's end of text is added, and `rollout.stop_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipo_megatron.config.model_folder import ModelFileError, read_object
from clipo_megatron.data.sources import DataError
from clipo_megatron.data.templates import TemplateRefusal, render_template

_TEXT_MODELS = ("decoder", "generator", "text_config")  # where composite models keep their text model's settings
# Tokens by which released models end a turn or a text; the tokenizer's own are named as candidates.
_USUAL_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eom_id|>", "<|return|>",
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]",
)  # fmt: skip
_QUESTION, _ANSWER = "What is one and one?", "ANSWER"


@dataclass(frozen=True)
class UnendedTurn:
    """Why no token that the run stops at ends a turn, as a part of a sentence, and the tokens that could."""

    reason: str
    candidates: tuple[str, ...]


def stop_ids(folder: Path, tokenizer: Any, extra: Sequence[str] | None = None) -> tuple[int, ...]:
    """The ids of all tokens that end a response, sorted.

    Args:
        folder: the Hugging Face folder of the model.
        tokenizer: the tokenizer of that folder.
        extra: texts of further tokens (rollout.stop_tokens).

    Raises:
        DataError: a file names an end that is no token id, or an `extra` text is no token of the tokenizer.
    """
    ids = set(declared_ids(folder))
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return tuple(sorted(ids | {_id_of(text, tokenizer) for text in extra or ()}))


def declared_ids(folder: Path) -> tuple[int, ...]:
    """The ids that the model's files name as the end, in the order in which transformers looks for them.

    Negative ids stand for "none"; ids beyond the vocabulary are never drawn, and no server need know them.

    Raises:
        DataError: a file is no JSON object, or names an end that is no whole number.
    """
    config = _read(folder / "config.json")
    sizes = [size for place in _places(config) if isinstance(size := place.get("vocab_size"), int)]
    generation = folder / "generation_config.json"
    for file, place in ((generation, _read(generation)), *((folder / "config.json", each) for each in _places(config))):
        ids = _ids(place.get("eos_token_id"), file)
        if ids := tuple(each for each in ids if each >= 0 and (not sizes or each < sizes[0])):
            return ids
    return ()


def unended_turn(tokenizer: Any, ids: Sequence[int], options: Mapping[str, Any] | None = None) -> UnendedTurn | None:
    """What is wrong if a response that ends its turn as the chat template writes it goes on to the length limit.

    An exchange is rendered by the template, and what it writes behind the answer is compared with the tokens `ids` that
    the run stops at. None where one of them ends the turn, or where the template does not show how turns end.

    Args:
        tokenizer: a tokenizer with a chat template.
        ids: from `stop_ids`.
        options: model.template_options.
    """
    behind = _behind_an_answer(tokenizer, options or {})
    marks = _marks(behind, tokenizer)
    if any(each in ids for each in tokenizer(behind, add_special_tokens=False)["input_ids"]):
        return None
    if marks:
        return UnendedTurn(f"the chat template ends a turn with {marks[0]}, at which nothing stops", tuple(marks))
    if (text := behind.strip()) and text[0] in "<[":
        reason = f"the chat template ends a turn with {text.split()[0]!r}, which is no single token of the tokenizer"
        return UnendedTurn(reason, _usual_ends(tokenizer))
    if not ids:
        reason = "neither generation_config.json, config.json nor the tokenizer names a token that ends a response"
        return UnendedTurn(reason, _usual_ends(tokenizer))
    return None


def _behind_an_answer(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """The text that the chat template writes behind the answer of an exchange; "" where it does not show one."""
    for turns in ([("user", _QUESTION), ("assistant", _ANSWER)], [("assistant", _ANSWER)]):
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            (text,) = render_template(tokenizer, [messages], options)
        except TemplateRefusal:  # rendering the prompts reports it in words
            continue
        _, found, behind = text.rpartition(_ANSWER)
        if found:
            return behind
    return ""


def _marks(text: str, tokenizer: Any) -> list[str]:
    """The added tokens in a text, each once and in order."""
    added = tokenizer.get_added_vocab()
    by_id = {number: name for name, number in added.items()}
    found = [by_id[each] for each in tokenizer(text, add_special_tokens=False)["input_ids"] if each in by_id]
    return list(dict.fromkeys(found))


def _usual_ends(tokenizer: Any) -> tuple[str, ...]:
    words = tokenizer.get_vocab()
    return tuple(each for each in _USUAL_ENDS if each in words)


def _id_of(text: str, tokenizer: Any) -> int:
    found = tokenizer.get_vocab().get(text)
    if found is None:
        near = ", ".join(_usual_ends(tokenizer)) or "none of the usual ones"
        raise DataError(
            f"rollout.stop_tokens: {text!r} is no single token of the tokenizer, so no response can stop at it. "
            f"Name a token as it stands in tokenizer.json; it has {near}."
        )
    return int(found)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except FileNotFoundError:
        return {}
    except ModelFileError as error:
        raise DataError(f"{error}. Fetch the model folder again.") from error


def _places(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of a model, and those of the text model inside it."""
    yield config
    inner = next((each for name in _TEXT_MODELS if (each := config.get(name))), None)
    if isinstance(inner, Mapping):
        yield inner


def _ids(named: Any, file: Path) -> tuple[int, ...]:
    if named is None:
        return ()
    found = named if isinstance(named, list) else [named]
    for each in found:
        if isinstance(each, bool) or not isinstance(each, int):
            raise DataError(
                f"{file} has eos_token_id = {json.dumps(named)}, and {json.dumps(each)} is no token id. Write the "
                "number of the token that ends a response, a list of such numbers, or null."
            )
    return tuple(found)
