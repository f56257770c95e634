"""Optional packages: why one cannot be used, in words that tell a missing package from a broken one."""

from __future__ import annotations

import importlib
from importlib import metadata, util
from importlib.machinery import ModuleSpec


def unusable(package: str, module: str = "") -> tuple[str, str] | None:
    """Import an optional package; return (reason, what to do) if that fails, None if it works.

    Args:
        package: its name, for Python and for pip.
        module: of the package, the one to import; "": the package.
    """
    found = util.find_spec(package)
    if found is None:
        return not_installed(package)
    if not isinstance(found, ModuleSpec):
        return None
    try:
        importlib.import_module(module or package)
    except Exception as error:  # what a package does while it is imported can raise anything
        return why(package, error)
    return None


def other_version(package: str, *, wanted_by: str) -> tuple[str, str] | None:
    """(reason, what to do) if a package is installed in a version that another package, by its own word, does not take.

    None if that is not so, or if one of the two is not installed or says nothing.
    """
    from packaging.requirements import Requirement

    try:
        found = metadata.version(package)
        wanted = [Requirement(line) for line in metadata.requires(wanted_by) or ()]
    except metadata.PackageNotFoundError:
        return None
    for each in wanted:
        if each.name.replace("_", "-").lower() == package and not each.specifier.contains(found, prereleases=True):
            reason = (
                f"{package} {found} is installed, and {wanted_by} {metadata.version(wanted_by)} takes {each.specifier}"
            )
            return reason, f"pip install '{package}{each.specifier}', or uninstall it"
    return None


def why(package: str, error: Exception) -> tuple[str, str]:
    """Say why importing `package` raised `error`: it is missing, something that it needs is, or it is broken."""
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if util.find_spec(package) is None or (missing and missing.partition(".")[0] == package):
        return not_installed(package)
    if missing:
        root = missing.partition(".")[0]
        return f"the package {package} is installed, and {missing}, which it needs, is not", f"pip install {root}"
    return (
        f"the package {package} is installed and cannot be imported ({type(error).__name__}: {error})",
        f"pip install --upgrade --force-reinstall {package}",
    )


def not_installed(package: str) -> tuple[str, str]:
    """The reason and the remedy for a package that is not there."""
    return f"the package {package} is not installed", f"pip install {package}"
