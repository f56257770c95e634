"""reasoning-gym's data sets by name, without importing those that nobody names.

The package's `__init__` imports every generator, with SymPy and matplotlib: seconds for a run that needs one of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "reasoning_gym"


def factory_with(generator: str) -> ModuleType:
    """`reasoning_gym.factory`, which knows this data set if there is one; if there is none, it knows all of them.

    Of the package only the folder is imported in which a file has the data set's name, and everything if that does not
    give the data set.
    """
    if PACKAGE not in sys.modules:
        _begin()
    if folder := _folder_of(generator):
        importlib.import_module(f"{PACKAGE}.{folder}")
    factory = importlib.import_module(f"{PACKAGE}.factory")
    if not folder or generator not in factory.DATASETS:
        _complete()
    return factory


def _folder_of(generator: str) -> str:
    """The folder of the package that has a file of this name somewhere in it; "" if there is none."""
    if generator.isidentifier():
        for root in map(Path, sys.modules[PACKAGE].__path__):
            for file in root.glob(f"*/**/{generator}.py"):
                return file.relative_to(root).parts[0]
    return ""


def _begin() -> None:
    """Make parts of the package importable; the package itself is completed when something else is asked of it."""
    package = importlib.util.module_from_spec(importlib.util.find_spec(PACKAGE))
    package.__getattr__ = _asked_for  # type: ignore[method-assign]
    sys.modules[PACKAGE] = package
    importlib.import_module(f"{PACKAGE}.coaching")  # before `factory`, for they import each other


def _asked_for(name: str) -> Any:
    """What the package has under a name that is not there yet: one of its modules, or what its `__init__` defines."""
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{PACKAGE}.{name}":
            raise
    _complete()
    return getattr(sys.modules[PACKAGE], name)


def _complete() -> None:
    """Run the package's `__init__`, once."""
    package = sys.modules[PACKAGE]
    if vars(package).pop("__getattr__", None):
        package.__spec__.loader.exec_module(package)
