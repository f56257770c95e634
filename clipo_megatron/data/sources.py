"""Reads problems: parquet and jsonl files in the verl row schema, and reasoning-gym generators. Imports no torch.

A row of a file holds `data_source`, `prompt` [{role, content}, ...], `reward_model` {ground_truth, ...} and optionally
`extra_info`. Rows are numbered from 0, and their prompt ids too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import shortened, spell
from clipo_megatron.config.schema import Perturbation, SourceConfig
from clipo_megatron.data.generators import factory_with
from clipo_megatron.data.golds import why_no_answer
from clipo_megatron.data.perturbations import PerturbationError, perturb
from clipo_megatron.data.row_values import may_be_unfit, unfit_part, why_unfit

FILE_TYPES = (".parquet", ".jsonl")
ROLES = ("system", "user", "assistant", "tool")
_COLUMNS, _EXTRA = ("data_source", "prompt", "reward_model"), "extra_info"
_EXAMPLE = (  # a row, for those whose rows look otherwise
    '{"data_source": "my/set", "prompt": [{"role": "user", "content": "What is 6 x 7?"}], '
    '"reward_model": {"ground_truth": "42"}}'
)
_LONGEST_ROW = 1 << 26  # bytes of a line; a prompt of a million tokens has a tenth of that
MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # fields that a text model cannot be asked with


class DataError(ValueError):
    """A source cannot be read; the message names the file or generator, the row and the field."""


@dataclass(frozen=True, slots=True)
class Row:
    """One problem before the chat template is applied."""

    id: str  # "<source name>/<row>"
    messages: tuple[Mapping[str, str], ...]
    data_source: str
    ground_truth: str
    extra: Mapping[str, Any]  # the row's `extra_info`, or the generator's whole entry


def rows_of_all(sources: Sequence[SourceConfig]) -> Iterator[Row]:
    """The rows of all sources, one after another.

    Raises:
        DataError: a source cannot be read, or two sources have the same name.
    """
    names = [source.label for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{names.count(name)} sources are called {name}, and prompt ids derive from it. Name each.")
    return (row for source in sources for row in rows_of(source))


def read(source: SourceConfig) -> list[Row]:
    """The rows of one source; see `rows_of`."""
    return list(rows_of(source))


def rows_of(source: SourceConfig) -> Iterator[Row]:
    """The rows of one source one after another, with its suffix appended to the last user turn.

    Raises:
        DataError: a missing or unreadable file, an invalid row, fewer rows than `size`, an unknown generator or option.
    """
    if source.generator is not None:
        rows = _generate(source)
    elif source.path is not None:
        rows = _read_file(source, Path(source.path))
    else:
        raise DataError(f"the source {source.name!r} has neither a path nor a generator. Give one of them.")
    count = 0
    for row in rows:
        count += 1
        yield _with_suffix(row, source.suffix) if source.suffix else row
    if not count:
        raise DataError(f"{source.path or source.generator} has no rows. Remove the source, or fill it.")
    if source.path is not None and source.size is not None and count < source.size:
        raise DataError(f"{source.path} has {count} rows, and size = {source.size} asks for more. Lower it.")


def question_key(messages: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """What is equal for problems that ask the same: their user turns, up to white space."""
    return tuple(" ".join(turn["content"].split()) for turn in messages if turn["role"] == "user")


def problem_key(data_source: str, ground_truth: str, messages: Iterable[Mapping[str, str]]) -> tuple[Any, ...]:
    """What is equal for exact repetitions of a problem."""
    return data_source, ground_truth, tuple((turn["role"], turn["content"]) for turn in messages)


def source_of(problem: str) -> str:
    """The name of the source of a problem id, "<source name>/<row>"."""
    return problem.rpartition("/")[0]


def _with_suffix(row: Row, suffix: str) -> Row:
    *before, last = row.messages
    return replace(row, messages=(*before, {**last, "content": last["content"] + suffix}))


# ---------------------------------------------------------------- files


def _read_file(source: SourceConfig, path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(f"there is no file {path} (current directory: {Path.cwd()}). Correct data.train or data.eval.")
    if path.suffix not in FILE_TYPES:
        raise DataError(f"{path} is neither *.parquet nor *.jsonl. Convert it to one of them.")
    reader = _parquet if path.suffix == ".parquet" else _jsonl
    name = source.label
    records = islice(reader(path), source.size)
    for number, (place, record) in enumerate(records):
        yield _row(record, id=f"{name}/{number}", place=place)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            _refuse_other_schemas(str(path), present)
            if doubled := [name for name in dict.fromkeys(present) if present.count(name) > 1]:
                raise DataError(f"{path} has several columns called {', '.join(doubled)}. Give each its own name.")
            columns = [column for column in (*_COLUMNS, _EXTRA) if column in present]
            media, number = [column for column in MEDIA if column in present], 0
            size = 64 if media else 1024  # a picture is as large as thousands of texts
            for batch in file.iter_batches(batch_size=size, columns=[*columns, *media]):
                shown = {row: column for column in media for row in _filled(batch.column(column))}
                for row, record in enumerate(_records(batch.select(columns), path, number)):
                    if row in shown:
                        raise _media_error(f"{path}, row {number}", shown[row])
                    yield f"{path}, row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}. Write the file again.") from None


def _records(batch: Any, path: Path, first: int) -> list[Any]:
    """The rows of a batch as plain values; a DataError if a text is none."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(batch)):
            for name in batch.schema.names:
                try:
                    batch.column(name)[row].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, row {first + row}, field {name}: its bytes are no UTF-8 ({error.reason} at byte "
                        f"{error.start}). Write the column as text again."
                    ) from None
        raise


def _filled(column: Any) -> list[int]:
    """The rows of a batch that have something in this column: neither nothing nor an empty list or text."""
    return [row for row, value in enumerate(column) if value.is_valid and (not hasattr(value, "__len__") or len(value))]


def _media_error(place: str, field: str) -> DataError:
    return DataError(
        f"{place}, field {field}: the question comes with {field}, and policies here read text alone. Remove such "
        "rows, or the field where the text says everything."
    )


def unread_fields(file: str) -> list[str]:
    """The fields of a file's rows that nothing here reads, as far as its schema or its first row tells.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(file)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        names = pyarrow.parquet.read_schema(path).names
    else:
        names = next((list(record) for _, record in _jsonl(path) if isinstance(record, Mapping)), [])
    return [name for name in names if name not in (*_COLUMNS, _EXTRA)]


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with path.open("rb") as lines:
        for line_number, line in enumerate(iter(lambda: lines.readline(_LONGEST_ROW + 1), b""), start=1):
            if not line.strip():
                continue
            place = f"{path}, row {number} (line {line_number})"
            if len(line) > _LONGEST_ROW:
                raise DataError(
                    f"{place}: the line has more than {_LONGEST_ROW >> 20} MiB. Give each row its own line."
                )
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not valid JSON: {error}. Correct the line.") from None
            if may_be_unfit(line) and (found := unfit_part(record)):
                raise DataError(f"{place}, field {found[0]}: {found[1]}. Correct the row.")
            yield place, record
            number += 1


def _row(record: Any, *, id: str, place: str) -> Row:
    """The row of one record in the verl schema; a DataError if a field is missing or invalid."""

    def refuse(field: str, reason: str) -> DataError:
        return DataError(f"{place}, field {field}: {reason}. Correct the row.")

    if not isinstance(record, Mapping):
        raise DataError(f"{place}: a mapping of fields was expected, not {_kind(record)}. Correct the row.")
    _refuse_other_schemas(place, record)
    data_source = record["data_source"]
    if not isinstance(data_source, str) or not data_source:
        raise refuse("data_source", f"text was expected, not {_kind(data_source)}")
    for field in MEDIA:
        if record.get(field):
            raise _media_error(place, field)
    turns = record["prompt"]
    if not isinstance(turns, list) or not turns:
        raise refuse(
            "prompt", f'a list of turns such as [{{"role": "user", "content": "..."}}] was expected, not {_kind(turns)}'
        )
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise refuse(f"prompt[{index}]", f"a turn {{role, content}} was expected, not {_kind(turn)}")
        if turn.get("role") not in ROLES:
            raise refuse(
                f"prompt[{index}].role", f"one of {', '.join(ROLES)} was expected, not {_kind(turn.get('role'))}"
            )
        if not isinstance(turn.get("content"), str):
            raise refuse(f"prompt[{index}].content", f"text was expected, not {_kind(turn.get('content'))}")
    if turns[-1]["role"] != "user":
        raise refuse("prompt", f"the last turn must be the user's, not the {turns[-1]['role']}'s")
    if not turns[-1]["content"].strip():
        raise refuse(f"prompt[{len(turns) - 1}].content", "it is empty")
    rule = record["reward_model"]
    if not isinstance(rule, Mapping):
        raise refuse("reward_model", f"a mapping with ground_truth was expected, not {_kind(rule)}")
    truth = rule.get("ground_truth")
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)) or truth == "":
        raise refuse("reward_model.ground_truth", f"text was expected, not {_kind(truth)}")
    if (reason := why_no_answer(truth)) is not None:
        raise refuse("reward_model.ground_truth", reason)
    extra = record.get(_EXTRA)
    if extra is not None and not isinstance(extra, Mapping):
        raise refuse("extra_info", f"a mapping was expected, not {_kind(extra)}")
    texts = {f"prompt[{index}].content": turn["content"] for index, turn in enumerate(turns)}
    for field, text in {"data_source": data_source, "reward_model.ground_truth": truth, **texts}.items():
        if reason := why_unfit(text):
            raise refuse(field, reason)
    messages = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    return Row(id=id, messages=messages, data_source=data_source, ground_truth=str(truth), extra=dict(extra or {}))


def _refuse_other_schemas(place: str, present: Collection[str]) -> None:
    """Raise a DataError that shows a row as it has to be, where one of its fields is absent."""
    if absent := [column for column in _COLUMNS if column not in present]:
        raise DataError(
            f"{place} has no {', '.join(absent)}; it has {shortened(', '.join(map(str, present)), 200) or 'nothing'}. "
            f"Write rows such as {_EXAMPLE}; docs/data.md shows how."
        )


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if value == "" or value == []:
        return "an empty one"
    kind = {str: "text", dict: "a mapping", list: "a list"}.get(type(value), type(value).__name__)
    return kind if isinstance(value, (dict, list)) else f"{kind} {spell(value)!r}"


# ---------------------------------------------------------------- generators


def _generate(source: SourceConfig) -> Iterator[Row]:
    generator, name = source.generator or "", source.label
    factory = factory_with(generator)
    if generator not in factory.DATASETS:
        close = difflib.get_close_matches(generator, factory.DATASETS, n=3, cutoff=0.5)
        remedy = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(sorted(factory.DATASETS))}."
        raise DataError(f"reasoning-gym has no data set {generator!r}. {remedy}")
    if source.size is None:
        raise DataError(f"the generator {generator} needs a size: how many problems to make. Set it.")
    known = {item.name for item in fields(factory.DATASETS[generator][1])} - {"seed", "size"}
    for option in source.options:
        if option not in known:
            raise DataError(
                f"the generator {generator} has no option {option!r}. It has {', '.join(sorted(known)) or 'none'}."
            )
    try:
        problems = factory.create_dataset(generator, seed=source.seed, size=source.size, **source.options)
    except Exception as error:  # generators check their options with assertions that have messages
        raise DataError(
            f"the generator {generator} refuses its options {source.options}: {error}. Correct them."
        ) from None
    change = Perturbation(source.perturb) if source.perturb else None
    for number in range(source.size):
        try:
            entry = problems[number] if change is None else perturb(problems, number, change, source.seed)
            question, answer = entry["question"], entry["answer"]
        except PerturbationError:
            continue  # the others keep their numbers, which pair them with the unchanged problems
        except Exception as error:  # third-party code, which may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise DataError(
                f"the generator {generator} fails at problem {number}: {reason}. Change its options."
            ) from error
        yield Row(
            id=f"{name}/{number}",
            messages=({"role": "user", "content": question},),
            data_source=f"reasoning_gym/{generator}",
            # data sets with many correct answers name none; their scorers read the entry
            ground_truth="" if answer is None else str(answer),
            extra=entry,
        )
