"""Makes the file of a run's prompts, once: rows read, rendered and tokenized a few at a time, whatever their number.

The file's name is a digest of all that its content depends on, so a file that is there already is used as it is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from clipo_megatron.config.schema import SourceConfig
from clipo_megatron.data.golds import without_answer
from clipo_megatron.data.prompt_table import PromptTable, TableWriter
from clipo_megatron.data.rendering import ChatRenderer
from clipo_megatron.data.sources import DataError, Row, read, rows_of_all
from clipo_megatron.data.templates import TemplateRefusal

SUFFIX = ".prompts"
_AT_ONCE = 256  # rows that are rendered and tokenized together: more are not faster
_WHOLE = 200_000  # characters of a prompt that is tokenised as a whole, however many tokens may be too many
_READ_BYTES = 1 << 20
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "reasoning-gym")  # whose versions decide what prompts are


@dataclass(frozen=True)
class PromptSettings:
    """What decides how rows become prompts, and which are left out."""

    system_prompt: str | None
    max_prompt_tokens: int
    template_options: Mapping[str, Any] = field(default_factory=dict)


def prompts_of(sources: Sequence[SourceConfig], tokenizer: Any, settings: PromptSettings) -> PromptTable:
    """The prompts of all sources that are short enough, in a file that is gone when nobody uses it any more.

    Args:
        sources: where the rows are.
        tokenizer: a Hugging Face tokenizer with a chat template.
        settings: how rows become prompts.

    Raises:
        DataError: a source cannot be read, the template cannot render a row, or no prompt fits.
    """
    with tempfile.TemporaryFile() as file:
        write_prompts(rows_of_all(sources), tokenizer, settings, file)
        return PromptTable(file, reread=rereader(sources))


def prompt_file(sources: Sequence[SourceConfig], tokenizer: Any, settings: PromptSettings, folder: Path) -> Path:
    """The file of prompts in `folder`, which is written unless it is there.

    Raises:
        DataError: as for `prompts_of`, or the folder refuses files.
    """
    path = folder / f"{_digest(sources, tokenizer, settings)}{SUFFIX}"
    if path.is_file():
        return path
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            write_prompts(rows_of_all(sources), tokenizer, settings, file)
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"{folder} cannot take the prompts: {error}. Free space, or correct train.output.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return path


def rereader(sources: Sequence[SourceConfig]) -> Any:
    """A function that gives all rows of a source by its name, each by its id, and keeps those of the last one."""
    by_name = {source.label: source for source in sources}

    @lru_cache(maxsize=1)
    def rows(name: str) -> Mapping[str, Row]:
        return {row.id: row for row in read(by_name[name])}

    return rows


def write_prompts(rows: Iterable[Row], tokenizer: Any, settings: PromptSettings, file: BinaryIO) -> None:
    """Write a table of the prompts of `rows`: chat template with generation prompt, without those that are too long.

    Raises:
        DataError: the template cannot render a row, or there are rows and no prompt fits.
    """
    renderer = ChatRenderer(tokenizer, settings.system_prompt, settings.template_options)
    writer, count, shortest = TableWriter(file), 0, 0
    # More characters are too many tokens for certain, and could take a minute to be tokenised.
    most = max(_WHOLE, (settings.max_prompt_tokens + 1) * max(map(len, tokenizer.get_vocab()), default=1))
    for some in _batches(rows):
        rendered = _rendered(renderer, some)
        ids = tokenized(tokenizer, [text[:most] for text, _ in rendered])
        for row, (text, turns), tokens in zip(some, rendered, ids, strict=True):
            if len(tokens) > settings.max_prompt_tokens or len(text) > most:
                writer.leave_out(row)
            elif without_answer([row])[1]:
                writer.leave_out_unanswered(row)
            else:
                writer.add(row, turns, text, tokens)
        count += len(some)
        fewest = min(map(len, ids))
        shortest = min(shortest, fewest) if shortest else fewest
    if writer.unanswered and not len(writer):
        raise DataError(
            f"all {len(writer.unanswered)} problems that are short enough have an empty \\boxed{{}} as answer, such as "
            f"{writer.unanswered[0]}. Give other problems."
        )
    if count and not len(writer):
        raise DataError(
            f"data.max_prompt_tokens = {settings.max_prompt_tokens} leaves out all {count} prompts: the shortest has "
            f"{shortest} tokens. Raise it."
        )
    writer.finish()


def _rendered(renderer: ChatRenderer, rows: Sequence[Row]) -> list[tuple[str, tuple[Mapping[str, str], ...]]]:
    """Text and turns of each row; a DataError names the first row that the template cannot render."""
    try:
        return renderer.render_all([row.messages for row in rows])
    except TemplateRefusal:  # of one of them: rendered one by one, the row can be named
        found = []
        for row in rows:
            try:
                found.append(renderer.render(row.messages))
            except DataError as error:
                raise DataError(f"prompt {row.id}: {error}") from error
        return found


def tokenized(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The token ids of rendered texts, in which the template has written the special tokens already."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    # The same without the places of tokens in the text, which take a tenth of the time.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while some := list(islice(left, _AT_ONCE)):
        yield some


# ---------------------------------------------------------------- what a file of prompts depends on


def _digest(sources: Sequence[SourceConfig], tokenizer: Any, settings: PromptSettings) -> str:
    facts = {
        "sources": [asdict(source) | {"content": _content(source)} for source in sources],
        "settings": asdict(settings),
        "tokenizer": tokenizer_digest(tokenizer),
        "code": _code(),
        "libraries": [_version(name) for name in _LIBRARIES],
    }
    return blake2b(json.dumps(facts, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of all that turns messages into token ids: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if hasattr(backend, "to_str") else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = tokenizer.chat_template
    facts = [type(tokenizer).__name__, template, tokenizer.special_tokens_map, getattr(tokenizer, "padding_side", "")]
    if "strftime_now" in str(template):
        facts.append(date.today().isoformat())  # the template writes it into the prompt
    return blake2b(words.encode() + json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _content(source: SourceConfig) -> str:
    """A digest of a source's file; a generator's problems follow from its settings."""
    if source.path is None:
        return ""
    digest = blake2b(digest_size=16)
    try:
        with open(source.path, "rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
    except OSError:
        return "unreadable"  # reading the rows says so in words
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the modules here, since prompts follow from them too."""
    digest = blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
