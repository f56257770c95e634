"""Landlock: a process that gives up all files but the libraries of its interpreter, and those for reading only."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
import sysconfig
from pathlib import Path

# linux/landlock.h; the numbers of these system calls are the same on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_OF_RULES = 1  # flag of _CREATE_RULESET
_PATH_BENEATH = 1  # kind of a rule
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# Rights that a version of the kernel's interface adds, all of which are given up
_RIGHTS_ON_FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_RIGHTS_ON_NETWORK = {4: 0b11}  # to bind and to connect TCP
_SCOPES = {6: 0b11}  # abstract Unix sockets and signals stay within
_SYSTEM = (  # what C libraries and Python read of the system
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"),
    *("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/dev/random"),
)


def package_parent() -> str:
    """The folder in which this package lies."""
    return str(Path(__file__).resolve().parents[3])


def allow_libraries_only(libc: ctypes.CDLL) -> bool:
    """Give up every access to files but reading those of `readable`; False where the kernel has no Landlock.

    The process must have set no_new_privs.
    """
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_OF_RULES)
    if version < 1:
        return False
    rights = [_up_to(version, kind) for kind in (_RIGHTS_ON_FILES, _RIGHTS_ON_NETWORK, _SCOPES)]
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE_RULESET, struct.pack("=3Q", *rights), ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    try:
        return all(_allow(libc, ruleset, path) for path in readable()) and (
            libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
        )
    finally:
        os.close(ruleset)


def readable() -> list[str]:
    """The files and folders that a grader may read.

    Of the folder in which this package lies, that is the package alone: elsewhere in a checkout is the user's work.
    """
    parent, libraries = package_parent(), sysconfig.get_paths()
    installed = {libraries[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    paths = {
        *installed,
        *(path for path in sys.path if os.path.isabs(path) and path != parent),
        *(os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")),
        *filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)),
        *_SYSTEM,
        os.path.join(parent, "clipo_megatron"),
    }
    return sorted(path for path in paths if os.path.exists(path) and os.path.realpath(path) != "/")


def _allow(libc: ctypes.CDLL, ruleset: int, path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it cannot be read anyway
        return True
    try:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        rule = struct.pack("=Qi", _READ_FILE | (_READ_DIR if is_folder else 0), descriptor)
        return libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) == 0
    finally:
        os.close(descriptor)


def _up_to(version: int, added: dict[int, int]) -> int:
    rights = (bits for since, bits in added.items() if since <= version)
    return sum(rights)
