"""Packages in which every module and every name exists, and none can be used: whoever calls one is told that it is
missing, instead of getting a wrong number.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


class Missing:
    """A name that would be a function, a class, or a table of them."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Missing:
        return missing(self._name, attribute)

    def __call__(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Raises NotImplementedError, whatever it is asked."""
        package = self._name.partition(".")[0]
        raise NotImplementedError(
            f"{self._name} was called, and the package {package} is not installed: this server was set up to serve "
            "language models on a CPU. Choose options that do without it, or name an interpreter that has it."
        )


def missing(owner: str, attribute: str) -> Missing:
    """The attribute of a missing thing, which is missing too; but Python's own protocols are really absent."""
    if attribute.startswith("__"):
        raise AttributeError(f"{owner} has no {attribute}")
    return Missing(f"{owner}.{attribute}")


class _AbsentModule(ModuleType):
    def __getattr__(self, attribute: str) -> Missing:
        return missing(self.__name__, attribute)


class _Submodules(MetaPathFinder, Loader):
    def __init__(self, package: str):
        self._below = f"{package}."

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(self._below) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def pretend(package: str) -> None:
    """Make every submodule of a package importable; called by the package itself."""
    sys.meta_path.append(_Submodules(package))
