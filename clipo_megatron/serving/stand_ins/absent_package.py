"""Stand-ins for packages that are not installed: every name can be imported, and calling one raises an error."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


class Missing:
    """A name of a package that is not installed, such as a function or class."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Missing:
        return missing(self._name, attribute)

    def __call__(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """Raise NotImplementedError."""
        package = self._name.partition(".")[0]
        raise NotImplementedError(
            f"{self._name} was called, and the package {package} is not installed: this server was set up to serve "
            "language models on a CPU. Choose options that do without it, or name an interpreter that has it."
        )


def missing(owner: str, attribute: str) -> Missing:
    """The attribute of a missing name, which is missing too. Attributes of Python's own protocols do not exist."""
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
        """Does nothing."""


def pretend(package: str) -> None:
    """Make every submodule of a package importable; the package itself calls this."""
    sys.meta_path.append(_Submodules(package))
