"""Checks of the sources in the section `data`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RunConfig, SourceConfig
from clipo_megatron.data.perturbations import PERTURBABLE
from clipo_megatron.data.sources import FILE_TYPES


def data_problems(config: RunConfig, parts: Sequence[str]) -> Iterator[ConfigProblem]:
    """Problems of the sources in these `parts`, which are "train" and "eval"."""
    if "train" in parts and not config.data.train:
        remedy = "Add a source, such as `data.train=[{path: train.parquet}]`"
        yield ConfigProblem("data.train", "there is nothing to train on", remedy, show_value=False)
    for part in parts:
        sources: list[SourceConfig] = getattr(config.data, part)
        for index, source in enumerate(sources):
            yield from _source(source, f"data.{part}[{index}]")
        for name, count in Counter(source.label for source in sources).items():
            if count > 1 and name:
                reason = f"{count} sources are called {name}, and prompt ids derive from the name"
                yield ConfigProblem(f"data.{part}", reason, "Give each its own `name`", show_value=False)


def _source(source: SourceConfig, key: str) -> Iterator[ConfigProblem]:
    if (source.path is None) == (source.generator is None):
        held = "neither a path nor a generator" if source.path is None else "both a path and a generator"
        remedy = "Give exactly one of `path` (a file) and `generator` (a reasoning-gym data set)"
        yield ConfigProblem(key, f"it has {held}", remedy, show_value=False)
    elif source.path is not None:
        path = Path(source.path)
        if path.suffix not in FILE_TYPES:
            yield ConfigProblem(f"{key}.path", "this kind of file is not read", "Use *.parquet or *.jsonl", source.path)
        elif not path.is_file():
            reason = "there is no such file" + ("" if path.is_absolute() else f" below {Path.cwd()}")
            yield ConfigProblem(f"{key}.path", reason, "Correct the path", source.path, absent=True)
        if source.options:
            remedy = "Remove it, or name a generator"
            yield ConfigProblem(f"{key}.options", "only generators have options", remedy, show_value=False)
    elif source.size is None:
        reason = "a generator makes as many problems as asked for, and no number is given"
        yield ConfigProblem(f"{key}.size", reason, "Set it, for example to 1000", show_value=False)
    if source.perturb and source.generator not in PERTURBABLE:
        remedy = f"Set it to null, or the generator to {' or '.join(PERTURBABLE)}"
        yield ConfigProblem(f"{key}.perturb", "problems of this source have no changed forms", remedy, source.perturb)
    for option in ("size", "seed"):
        if option in source.options:
            reason = f"the source has its own setting, {key}.{option}"
            yield ConfigProblem(f"{key}.options.{option}", reason, "Move it there", source.options[option])
