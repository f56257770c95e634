"""Names of a user's own: in a file, or in an installed package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import ConfigError


def imported(place: str) -> Any:
    """What is at "file.py:name" or "package.module:name".

    Raises:
        ConfigError: the module cannot be imported, or has no such name.
    """
    source, _, name = place.rpartition(":")
    try:
        module = _module_of(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # whatever a user's file raises while it is run
        raise ConfigError(f"{source} cannot be imported: {type(error).__name__}: {error}. Correct it.") from error
    if not hasattr(module, name):
        raise ConfigError(f"{place}: {name} is not in it. Correct the name.")
    return getattr(module, name)


def _module_of(file: Path) -> Any:
    name = f"clipo_stage_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
