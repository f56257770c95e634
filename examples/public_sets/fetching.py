"""Fetch public data sets and write them as parquet in the verl row schema.

Sets come from the Hugging Face hub, in its parquet conversion of each data set, or as a file by URL. Files that exist
are not fetched again.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import rows

_PARQUET = "refs/convert/parquet"  # the hub's branch with the parquet files of a public data set
_SECONDS = 120
_SCHEMA = pyarrow.schema(
    [
        ("data_source", pyarrow.string()),
        ("prompt", pyarrow.list_(pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())]))),
        ("ability", pyarrow.string()),
        ("reward_model", pyarrow.struct([("ground_truth", pyarrow.string()), ("style", pyarrow.string())])),
        ("extra_info", pyarrow.struct([("index", pyarrow.int64()), ("split", pyarrow.string())])),
    ]
)


@dataclass(frozen=True)
class PublicSet:
    """A public data set, and how it becomes `<name>.parquet`."""

    name: str
    data_source: str
    where: str  # id of a data set on the hub, or the URL of a jsonl file
    convert: Callable[[rows.Record], rows.QuestionAndTruth | None]
    configs: tuple[str, ...] = ("default",)  # configurations of the data set, whose rows follow one another
    split: str = "test"
    choice: bool = False  # multiple choice
    size: int | None = None  # expected number of rows; another one is reported, since public sets change


def records_of(wanted: PublicSet) -> Iterable[rows.Record]:
    """The records of a set as they are published."""
    if wanted.where.startswith("https://"):
        with urllib.request.urlopen(wanted.where, timeout=_SECONDS) as answer:
            return [json.loads(line) for line in answer.read().decode().splitlines() if line.strip()]
    from huggingface_hub import HfApi, hf_hub_download

    place: dict[str, Any] = {"repo_type": "dataset", "revision": _PARQUET}
    files = HfApi().list_repo_files(wanted.where, **place)
    found: list[rows.Record] = []
    for config in wanted.configs:
        parts = sorted(file for file in files if file.startswith(f"{config}/{wanted.split}/"))
        if not parts:
            raise SystemExit(f"{wanted.where} has no {config}/{wanted.split} on the hub; it has {', '.join(files)}")
        for part in parts:
            found += pyarrow.parquet.read_table(hf_hub_download(wanted.where, part, **place)).to_pylist()
    return found


def convert(wanted: PublicSet, records: Iterable[rows.Record]) -> list[dict[str, Any]]:
    """Rows in the verl schema; records that cannot be asked as text are left out."""
    problems = [each for each in map(wanted.convert, records) if each is not None]
    split = "train" if wanted.name.startswith("train") else "test"
    return [
        rows.row(each, data_source=wanted.data_source, index=index, split=split, choice=wanted.choice)
        for index, each in enumerate(problems)
    ]


def write(folder: Path, wanted: PublicSet, found: Sequence[dict[str, Any]]) -> Path:
    """Write `<name>.parquet`, completely or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{wanted.name}.parquet"
    partial = file.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(found), schema=_SCHEMA), partial)
    partial.replace(file)
    return file


def main(sets: Sequence[PublicSet], description: str) -> int:
    """The command line of a track's fetch.py; returns its exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the files; default: data")
    parser.add_argument(
        "--set", dest="names", action="append", metavar="NAME", help="fetch this set only; may be repeated"
    )
    options = parser.parse_args()
    known = {each.name: each for each in sets}
    if unknown := set(options.names or ()) - set(known):
        parser.error(f"there is no set {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for wanted in [known[name] for name in options.names or known]:
        file = options.data / f"{wanted.name}.parquet"
        if file.exists():
            print(f"{file} is there already")
            continue
        found = convert(wanted, records_of(wanted))
        write(options.data, wanted, found)
        changed = f" ({wanted.size} were expected)" if wanted.size not in (None, len(found)) else ""
        print(f"{file}: {len(found)} rows of {wanted.where}{changed}")
    return 0
