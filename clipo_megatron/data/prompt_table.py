"""Prompts in a file: token ids and rows as they lie there, and a `Prompt` made of them when one is asked for.

The file is mapped into memory, so that all ranks of a machine share one copy of it and hold nothing themselves. It has

    rows, end to end (`row_codec.py`) | columns of numbers, end to end | a JSON index of the columns | its length

Rows are written as they come, so that whoever writes the file holds their numbers only.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipo_megatron.data.asked import asked_forms, opens_thinking
from clipo_megatron.data.row_codec import decode, encode
from clipo_megatron.data.sources import Row, problem_key, question_key, source_of
from clipo_megatron.flow import Prompt

_DIGEST_BYTES = 16  # two different questions share a digest with probability 1e-27 among a million
_COLUMNS = {
    "tokens": "<i4",
    "token_ends": "<i8",
    "row_ends": "<i8",
    "ids": "u1",
    "id_ends": "<i8",
    "questions": "u1",
    "problems": "u1",
}
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as it was rendered: a prompt without its tokens."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    data_source: str
    ground_truth: str
    extra: Mapping[str, Any]
    forms: tuple[str, ...]
    thinking: bool


class PromptTable(Sequence[Prompt]):
    """Prompts of a file in their order, or a choice of them.

    Args:
        file: what a `TableWriter` has written.
        reread: gives all rows of the source with this name, for values that the file cannot hold.
    """

    def __init__(self, file: Path | BinaryIO, reread: Callable[[str], Mapping[str, Row]] | None = None):
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
            self._bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._bytes[-_LENGTH_BYTES:], "little")
        index = json.loads(self._bytes[-_LENGTH_BYTES - length : -_LENGTH_BYTES])
        columns = {
            name: np.frombuffer(self._bytes, dtype=_COLUMNS[name], count=count, offset=offset)
            for name, (offset, count) in index["columns"].items()
        }
        self._columns = columns
        self._reread = reread
        self._chosen: np.ndarray | None = None  # indices into the file; None: all
        self.too_long_by_source: dict[str, int] = index["too_long_by_source"]
        self.unanswered: list[str] = index["unanswered"]  # ids of problems without an answer, which are left out
        self.data_sources: dict[str, int] = index["data_sources"]  # rows of each, those left out among them
        self.largest_token, self.largest_in = index["largest_token"]

    @property
    def too_long(self) -> int:
        """How many prompts were left out, for being too long."""
        return sum(self.too_long_by_source.values())

    def __len__(self) -> int:
        return len(self._columns["row_ends"]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        import torch  # here, so that prompts can be written and counted without torch

        row, tokens = self.row(index), self._part("tokens", "token_ends", self._place(index))
        return Prompt(
            id=row.id,
            messages=row.messages,
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            data_source=row.data_source,
            ground_truth=row.ground_truth,
            extra=row.extra,
            forms=row.forms,
            thinking=row.thinking,
        )

    def row(self, index: int) -> RenderedRow:
        """A prompt without its tokens."""
        id, ends, place = self.id_of(index), self._columns["row_ends"], self._place(index)
        messages, data_source, ground_truth, forms, thinking, extra = decode(
            self._bytes[_start(ends, place) : int(ends[place])]
        )
        extra = self._source_rows(id).extra if extra is None else extra
        return RenderedRow(id, tuple(messages), data_source, ground_truth, extra, tuple(forms), thinking)

    def rows(self) -> TableRows:
        """The prompts without their tokens; needs no torch."""
        return TableRows(self)

    def id_of(self, index: int) -> str:
        """The id of a prompt, without making the rest of it."""
        return self._part("ids", "id_ends", self._place(index)).tobytes().decode()

    def lengths(self) -> np.ndarray:
        """The number of tokens of each prompt, [prompts] int64."""
        counts = np.diff(self._columns["token_ends"], prepend=0)
        return counts if self._chosen is None else counts[self._chosen]

    def fingerprint(self) -> dict[str, Any]:
        """Plain values by which other prompts are told from these: their number, and digests of the questions, of the
        whole problems (with turns of the system and gold answers), and of the tokens, each in this order."""
        found: dict[str, Any] = {"count": len(self)}
        for name in ("questions", "problems"):
            rows = self._columns[name].reshape(-1, _DIGEST_BYTES)
            found[name] = _hex(rows if self._chosen is None else rows[self._chosen])
        tokens = self._columns["tokens"]
        if self._chosen is not None:
            kept = np.zeros(len(self._columns["row_ends"]), dtype=bool)
            kept[self._chosen] = True
            tokens = tokens[np.repeat(kept, np.diff(self._columns["token_ends"], prepend=0))]
        return found | {"tokens": _hex(tokens)}

    def without(self, others: PromptTable) -> PromptTable:
        """The prompts whose question is not among those of `others`; user turns are compared up to white space."""
        known = set(others._digests("questions"))
        keep = np.fromiter((digest not in known for digest in self._digests("questions")), dtype=bool, count=len(self))
        return self if keep.all() else self._choose(keep)

    def distinct(self) -> PromptTable:
        """The prompts without exact repetitions within a source; the first of several equal ones stays."""
        seen: set[tuple[str, bytes]] = set()
        keep = np.zeros(len(self), dtype=bool)
        for index, digest in enumerate(self._digests("problems")):
            key = (source_of(self.id_of(index)), digest)
            keep[index] = key not in seen
            seen.add(key)
        return self if keep.all() else self._choose(keep)

    def _place(self, index: int) -> int:
        """The index in the file of a prompt that has `index` in this table; an IndexError if there is none."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"there are {count} prompts, and no number {index}")
        index = int(index) % count
        return index if self._chosen is None else int(self._chosen[index])

    def _part(self, column: str, ends: str, place: int) -> np.ndarray:
        """What one prompt has of a column whose parts end at the numbers of the column `ends`."""
        return self._columns[column][_start(self._columns[ends], place) : int(self._columns[ends][place])]

    def _digests(self, column: str) -> Iterator[bytes]:
        """The digests of all prompts, in order."""
        rows = self._columns[column].reshape(-1, _DIGEST_BYTES)
        return (row.tobytes() for row in (rows if self._chosen is None else rows[self._chosen]))

    def _choose(self, keep: np.ndarray) -> PromptTable:
        chosen = object.__new__(PromptTable)
        chosen.__dict__.update(self.__dict__)
        chosen._chosen = np.flatnonzero(keep) if self._chosen is None else self._chosen[keep]
        return chosen

    def _source_rows(self, id: str) -> Row:
        if self._reread is None:
            raise LookupError(f"the row of prompt {id} holds values that no file keeps, and its source is not known")
        return self._reread(source_of(id))[id]


class TableRows(Sequence[RenderedRow]):
    """The rows of a table, each made when it is asked for."""

    def __init__(self, table: PromptTable):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self._table.row(index)


class PromptsById(Mapping[str, Prompt]):
    """The prompts of a sequence by their ids. Of a table only the ids are held."""

    def __init__(self, prompts: Sequence[Prompt]):
        self._prompts = prompts
        self._index: dict[str, int] | None = None

    def __getitem__(self, id: str) -> Prompt:
        return self._prompts[self._indices()[id]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices())

    def __len__(self) -> int:
        return len(self._prompts)

    def _indices(self) -> dict[str, int]:
        if self._index is None:
            prompts = self._prompts
            table = prompts if isinstance(prompts, PromptTable) else None
            ids = (table.id_of(index) if table else prompts[index].id for index in range(len(prompts)))
            self._index = {id: index for index, id in enumerate(ids)}
        return self._index


class TableWriter:
    """Writes a file of prompts, one after the other, and then `finish`es it. Holds tokens and digests, and no texts."""

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, 0
        self._tokens, self._token_ends, self._row_ends = array("i"), array("q"), array("q")
        self._ids, self._id_ends = bytearray(), array("q")
        self._questions, self._problems = bytearray(), bytearray()
        self._too_long: Counter[str] = Counter()
        self.unanswered: list[str] = []
        self._data_sources: Counter[str] = Counter()
        self._largest, self._largest_in = -1, ""

    def __len__(self) -> int:
        return len(self._row_ends)

    def add(self, row: Row, messages: Sequence[Mapping[str, str]], text: str, tokens: Sequence[int]) -> None:
        """Append a prompt: a row, the turns that were rendered of it, their text, and its token ids."""
        turns, asked = [dict(turn) for turn in messages], (asked_forms(text), opens_thinking(text))
        self._end += self._file.write(encode([turns, row.data_source, row.ground_truth, *asked], row.extra))
        self._row_ends.append(self._end)
        self._ids += row.id.encode()
        self._id_ends.append(len(self._ids))
        self._tokens.extend(tokens)
        self._token_ends.append(len(self._tokens))
        self._questions += _digest(question_key(messages))
        self._problems += _digest(problem_key(row.data_source, row.ground_truth, messages))
        self._data_sources[row.data_source] += 1
        if tokens and (largest := max(tokens)) > self._largest:
            self._largest, self._largest_in = largest, row.id

    def leave_out(self, row: Row) -> None:
        """Count a row whose prompt is too long."""
        self._too_long[source_of(row.id)] += 1
        self._data_sources[row.data_source] += 1

    def leave_out_unanswered(self, row: Row) -> None:
        """Note a row whose gold answer is none."""
        self.unanswered.append(row.id)
        self._data_sources[row.data_source] += 1

    def finish(self) -> None:
        """Write the columns and the index; the file then holds a table."""
        columns, offset = {}, self._end
        for name in _COLUMNS:
            values = getattr(self, f"_{name}")
            offset += self._file.write(b"\0" * (-offset % _LENGTH_BYTES))
            written = self._file.write(memoryview(values).cast("B")) if values else 0
            columns[name] = (offset, written // np.dtype(_COLUMNS[name]).itemsize)
            offset += written
        index = {
            "columns": columns,
            "too_long_by_source": self._too_long,
            "unanswered": self.unanswered,
            "data_sources": self._data_sources,
            "largest_token": (self._largest, self._largest_in),
        }
        text = json.dumps(index).encode()
        self._file.write(text + len(text).to_bytes(_LENGTH_BYTES, "little"))
        self._file.flush()


def _start(ends: np.ndarray, place: int) -> int:
    return int(ends[place - 1]) if place else 0


def _hex(values: np.ndarray) -> str:
    return blake2b(np.ascontiguousarray(values), digest_size=8).hexdigest()


def _digest(key: object) -> bytes:
    return blake2b(repr(key).encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()
