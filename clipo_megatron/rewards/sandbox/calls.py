"""Seccomp: a process that gives up all system calls but those that computing needs.

The filter is a list of what is allowed, so a call that a later kernel brings is refused as well. A refused call fails
with "operation not permitted"; one that the list is too old to know looks as if the kernel did not have it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_OPENED_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CLONE_THREAD = 0x00010000  # linux/sched.h
_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD to F_SETFL, and F_DUPFD_CLOEXEC: the others send signals, or lock
_IOCTL = (0x5401, 0x5421, 0x5450, 0x5451)  # is it a terminal, may it block, is it inherited
_SET_MODE_FILTER, _TSYNC, _SPEC_ALLOW = 1, 1, 4  # linux/seccomp.h
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_LATEST = 462  # the highest number known when this was written

# Name: number on x86_64, number on aarch64 (asm/unistd.h); None where the architecture has no such call.
_ALLOWED = {
    # reading and writing what is open
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "lseek": (8, 62),
    "close": (3, 57),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # what is there
    "stat": (4, None),
    "lstat": (6, None),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    # memory
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "mincore": (27, 232),
    "membarrier": (324, 283),
    # time
    "time": (201, None),
    "gettimeofday": (96, 169),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "times": (100, 153),
    "getrusage": (98, 165),
    # the process itself and its threads
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getrlimit": (97, 163),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "futex": (202, 98),
    "set_tid_address": (218, 96),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "arch_prctl": (158, None),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_BY_ARGUMENT = {  # allowed with some arguments only
    "open": (2, None),
    "openat": (257, 56),
    "clone": (56, 220),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
}
_CLONE3 = 435
# machine: place in the tables above, AUDIT_ARCH of linux/audit.h, number of the call `seccomp`
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}

# linux/bpf_common.h
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def allow_computing_only(libc: ctypes.CDLL) -> bool:
    """Give up all other system calls; False where the kernel has no seccomp, or the architecture is not known here.

    The process must have set no_new_privs.
    """
    machine = os.uname().machine
    if machine not in _ARCHITECTURES or struct.calcsize("P") != 8:  # a 32-bit program has calls of its own
        return False
    column, architecture, seccomp = _ARCHITECTURES[machine]
    program = b"".join(_program(column, architecture))
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    return libc.syscall(seccomp, _SET_MODE_FILTER, _TSYNC | _SPEC_ALLOW, header) == 0


def _program(column: int, architecture: int) -> list[bytes]:
    """The filter, for the kernel's classic BPF."""
    refused, unknown = _FAIL | errno.EPERM, _FAIL | errno.ENOSYS
    program = [
        _do(_LOAD, _ARCHITECTURE),
        _do(_EQUAL, architecture, yes=1),
        _do(_RETURN, _KILL),  # the numbers below would mean other calls
        _do(_LOAD, _NUMBER),
        _do(_GREATER, _LATEST, no=1),  # the second set of numbers of x86_64 lies above as well
        _do(_RETURN, unknown),
        _do(_EQUAL, _CLONE3, no=1),
        _do(_RETURN, unknown),  # the C library then asks for a thread by `clone`, whose flags can be read here
    ]
    for numbers in _ALLOWED.values():
        if numbers[column] is not None:
            program += [_do(_EQUAL, numbers[column], no=1), _do(_RETURN, _ALLOW)]
    for name, numbers in _BY_ARGUMENT.items():
        if numbers[column] is not None:
            check = _checks()[name]
            program += [_do(_EQUAL, numbers[column], no=len(check) + 1), *check, _do(_RETURN, refused)]
    return [*program, _do(_RETURN, refused)]


def _checks() -> dict[str, list[bytes]]:
    """Instructions that return "allowed" for the right arguments of a call, and else run to their end."""
    allow = _do(_RETURN, _ALLOW)

    def read_only(argument: int) -> list[bytes]:
        return [_load(argument), _do(_ANY_BIT, _OPENED_FOR_WRITING, yes=1), allow]

    def one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
        return [_load(argument), *(line for value in values for line in (_do(_EQUAL, value, no=1), allow))]

    reads_own = [_load(0), _do(_EQUAL, 0, no=5), _load(2), _do(_EQUAL, 0, no=3), _load(2, high=True)]
    return {
        "open": read_only(1),
        "openat": read_only(2),
        "clone": [_load(0), _do(_ANY_BIT, _CLONE_THREAD, no=1), allow],
        "tgkill": one_of(0, (os.getpid(),)),  # to itself, as abort() does
        "prlimit64": [*reads_own, _do(_EQUAL, 0, no=1), allow],  # reads a limit of its own, sets none
        "fcntl": one_of(1, _FCNTL),
        "ioctl": one_of(1, _IOCTL),
    }


def _load(argument: int, *, high: bool = False) -> bytes:
    """Load one half of an argument; both architectures are little-endian."""
    return _do(_LOAD, 16 + 8 * argument + 4 * high)


def _do(operation: int, operand: int, *, yes: int = 0, no: int = 0) -> bytes:
    """An instruction: how many of the next are skipped where a comparison is true, and where it is not."""
    return struct.pack("=HBBI", operation, yes, no, operand)
