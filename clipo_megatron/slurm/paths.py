"""Paths and programs that a user wrote, as a job's nodes can read them: absolute, from the submitting folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipo_megatron.config.schema import AlgorithmConfig, SourceConfig
from clipo_megatron.slurm.resources import SlurmError


def absolute(path: str | None) -> str | None:
    """Make a path absolute, links kept: a link may be the name under which all nodes know a place."""
    return path if path is None else os.path.abspath(path)


def source(config: SourceConfig) -> SourceConfig:
    """Make the path of a source of problems absolute."""
    return replace(config, path=absolute(config.path))


def program(name: str, option: str, *, must_exist: bool = False) -> str:
    """Make a program's path absolute. A bare name is looked up here, and left to the nodes' PATH if it is not found.

    Raises:
        SlurmError: it must exist, is written as a relative path, and is no file here.
    """
    if not name:
        return name
    name = os.path.expanduser(name)
    if "/" not in name:
        return shutil.which(name) or name
    if must_exist and not os.path.isabs(name) and not os.path.isfile(name):
        raise SlurmError(f"{option} {name}: there is no such file below {Path.cwd()}. Correct the path.")
    return os.path.abspath(name)


def algorithm(config: AlgorithmConfig) -> AlgorithmConfig:
    """Make the files of a user's own classes and functions absolute, in the names of methods and in their options."""
    plugins = [replace(each, name=_own(each.name), options=_options(each.options)) for each in config.plugins]
    return replace(config, name=_own(config.name), options=_options(config.options), plugins=plugins)


def files_of(config: AlgorithmConfig) -> list[str]:
    """The files of a user's own classes and functions."""
    values = [config.name, *config.options.values()]
    for each in config.plugins:
        values += [each.name, *each.options.values()]
    return [file for value in values if (file := _file_of(value))]


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _own(value) for name, value in options.items()}


def _own(value: Any) -> Any:
    """Make "file.py:name" absolute if there is such a file; any other value is returned as it is."""
    file = _file_of(value)
    return f"{os.path.abspath(file)}:{value.rpartition(':')[2]}" if file else value


def _file_of(value: Any) -> str:
    file, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return file if name.isidentifier() and file.endswith(".py") and os.path.isfile(file) else ""
