"""A user's own classes and functions, which settings name as "file.py:name" or "package.module:name"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import ConfigError, ConfigProblem


def import_object(path: str) -> Any:
    """Import the class or function that "file.py:name" or "package.module:name" names.

    Raises:
        ConfigError: the module cannot be imported, or has no such name.
    """
    source, _, name = path.rpartition(":")
    try:
        if source.endswith(".py"):
            file = Path(source).resolve()
            module = _module_of(file, file.stat().st_mtime_ns)
        else:
            module = importlib.import_module(source)
    except (Exception, SystemExit) as error:  # a user's file can raise anything while it is run
        raise ConfigError(f"{source} cannot be imported: {type(error).__name__}: {error}. Correct it.") from error
    if not hasattr(module, name):
        raise ConfigError(f"{path}: {name} is not in it. Correct the name.")
    return getattr(module, name)


def import_path_problems(key: str, path: str, kind: str) -> Iterator[ConfigProblem]:
    """Yield what is wrong with an import path, as far as can be said without importing it.

    Args:
        key: the setting that holds it.
        path: the setting's value.
        kind: what is named, "Class" or "function".
    """
    source, _, name = path.rpartition(":")
    if not source or not name.isidentifier():
        reason = f"no {kind.lower()} is named after a colon"
        yield ConfigProblem(key, reason, f"Write file.py:{kind} or package.module:{kind}", path)
    elif source.endswith(".py") and not Path(source).is_file():
        reason = "there is no such file" + ("" if Path(source).is_absolute() else f" below {Path.cwd()}")
        yield ConfigProblem(key, reason, "Correct the path", path)


@cache
def _module_of(file: Path, modified: int) -> Any:
    """Return the module of a file, which runs once in each version of the file."""
    digest = hashlib.blake2b(f"{file}\n{modified}".encode(), digest_size=6).hexdigest()
    name = f"clipo_user_{file.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
