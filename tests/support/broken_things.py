"""Broken things from a seed, and what a command has to make of each: one sentence, in time, and nothing lost.

A kind of broken things is a function that changes one thing in a folder with a sound run, and returns the command line
that meets it. Each case runs in a process of its own: a fork of one that has imported what commands import, with limits
of its CPU time and memory, and without root's powers. Case n of a kind and a seed is always the same. By
hand, 500 cases of a kind, and one of them again with all that it said:

    python tests/support/broken_things.py settings --seed 7 --count 500
    python tests/support/broken_things.py settings --seed 7 --only 31
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import warm

CPU_S = 30  # of one case; sound ones take less than five
MEMORY = 1 << 30  # above what the fork began with
IDLE_S = 20.0  # without any work, after which a case hangs
LONGEST_LINE, LONGEST_ANSWER = 2_000, 8_000
OUTPUT, HOME, TEMPORARY = OTHERS = ("said", "home", "temporary")  # folders beside a case's own
PRECIOUS = "precious.txt"
_UGLY = (
    (re.compile(r"Traceback \(most recent call last\)"), "a traceback"),
    (re.compile(r"^\S+\.py:\d+: \w*Warning: ", re.MULTILINE), "a warning of Python"),
    (re.compile(r"Exception ignored in|Fatal Python error|panicked at|Segmentation fault"), "a crash"),
)
NOBODY = 65534
_KEEP_CAPABILITIES, _DUMPABLE, _AMBIENT, _RAISE = 8, 4, 47, 2  # of prctl(2)
_READ_ALL, _CAPABILITIES_3 = 2, 0x20080522  # of capabilities(7)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
_FINE = (0, 2, 128 + signal.SIGINT)
_MAY_SAY_NO = ("plan", "scale", "verify")  # whose exit code 1 is an answer


@dataclass
class Attempt:
    """A command line that meets a broken thing, in an environment that may be broken too."""

    arguments: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)  # None: the variable is not set
    closed: Sequence[int] = ()  # standard streams that are closed
    limits: Mapping[int, int] = field(default_factory=dict)
    writes: Sequence[str] = ("out",)  # beginnings of names in the folder that the command may change
    call: Callable[[], Any] | None = None  # what is called in place of a command; its errors are for users


@dataclass(frozen=True)
class Verdict:
    """What became of one case; `wrong` is empty where it was handled well."""

    kind: str
    seed: int
    number: int
    arguments: Sequence[str]
    code: int
    wrong: str
    said: str

    def __str__(self) -> str:
        again = f"python tests/support/broken_things.py {self.kind} --seed {self.seed} --only {self.number}"
        words = " ".join(word if len(word) < 100 else f"{word[:97]}..." for word in map(ascii, self.arguments))
        return f"{self.wrong} (exit code {self.code})\n  again: {again}\n  clipo {words}\n{self.said[-3000:]}"


def verdicts(kind: str, seed: int, numbers: Iterable[int]) -> Iterator[Verdict]:
    """Run cases of a kind one after another in this process's forks, and judge each."""
    from broken_kinds import KINDS, write_sound

    with tempfile.TemporaryDirectory(prefix="broken-") as root:
        sound = Path(root) / "sound"
        write_sound(sound)
        for number in numbers:
            folder = Path(root) / "user" / "case"
            shutil.copytree(sound, folder)
            (folder.parent / PRECIOUS).write_text("of the user")
            for name in OTHERS:
                (folder.parent / name).mkdir()
            try:
                with contextlib.chdir(folder):
                    attempt = KINDS[kind](random.Random(f"{kind} {seed} {number}"), folder)
                code, wrong, said = _run(attempt, folder)
                yield Verdict(kind, seed, number, attempt.arguments, code, wrong, said)
            finally:
                _remove(folder.parent)


def in_fork(kind: str, seed: int, numbers: Sequence[int]) -> list[Verdict]:
    """The verdicts of cases that are run by a fork of the warm server, which has no threads that could hold a lock."""
    context = warm.context()
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs, kind, seed, list(numbers)))
    worker.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        worker.join()


def _work(pipe: Any, kind: str, seed: int, numbers: Sequence[int]) -> None:
    pipe.send(list(verdicts(kind, seed, numbers)))


def _run(attempt: Attempt, folder: Path) -> tuple[int, str, str]:
    """Run a case; returns its exit code, what is wrong with how it went, and all that it said."""
    before, output = _facts(folder.parent), folder.parent / OUTPUT
    if os.geteuid() == 0:
        for path in (folder.parent.parent, folder.parent, *(folder.parent / name for name in before)):
            os.lchown(path, NOBODY, NOBODY)
    pid = os.fork()
    if pid == 0:
        _live(attempt, folder, output)
    code, peak, hung = _ended(pid)
    said = {name: (output / name).read_bytes().decode(errors="backslashreplace") for name in ("stdout", "stderr")}
    wrong = _fault(attempt, code, said) if not hung else "it hangs: nothing worked any more"
    if not wrong and peak > MEMORY:
        wrong = f"it took {peak >> 20} MiB of memory"
    wrong = wrong or _damage(before, _facts(folder.parent), folder, attempt.writes)
    return code, wrong, f"{said['stdout'][-1500:]}\n--- stderr\n{said['stderr']}"


def _fault(attempt: Attempt, code: int, said: Mapping[str, str]) -> str:
    """What is wrong with an exit code and what was said; "" if nothing is."""
    whole = said["stderr"] + said["stdout"]
    if code == -signal.SIGXCPU:
        return f"it took more than {CPU_S} s of CPU time"
    for pattern, name, where in (*((*each, whole) for each in _UGLY), (_CONTROL, "control characters", said["stderr"])):
        if found := pattern.search(where):
            return f"it said {name}: {where[max(found.start() - 40, 0) : found.end() + 40]!r}"
    answers = code == 1 and any(word in attempt.arguments for word in _MAY_SAY_NO)
    if code not in _FINE and not answers:
        return "this exit code is not documented"
    if code == 2 and 2 not in attempt.closed and len(said["stderr"].strip()) < 20:
        return "it ended in silence"
    if (longest := max(map(len, said["stderr"].splitlines()), default=0)) > LONGEST_LINE:
        return f"a line of {longest} characters"
    return f"{len(said['stderr'])} characters on stderr" if len(said["stderr"]) > LONGEST_ANSWER else ""


def _damage(before: Mapping[str, Any], after: Mapping[str, Any], folder: Path, writes: Sequence[str]) -> str:
    """What has changed that no command may change; "" if nothing has."""
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path) or path.partition(os.sep)[0] in OTHERS:
            continue
        inside = path.removeprefix(f"{folder.name}{os.sep}")
        if inside != path and any(inside.startswith(name) for name in writes):
            continue
        what = "made" if path not in before else "removed" if path not in after else "changed"
        return f"it {what} {path}, which is not its own"
    return ""


def _facts(folder: Path) -> dict[str, tuple[int, ...]]:
    """Kind, mode, size and time of change of everything below a folder."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            facts = os.lstat(path)
            whole = () if stat.S_ISDIR(facts.st_mode) else (facts.st_size, facts.st_mtime_ns)
            found[os.path.relpath(path, folder)] = (facts.st_mode, *whole)
    return found


def _remove(folder: Path) -> None:
    for place, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(path := os.path.join(place, name)):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)


# ---------------------------------------------------------------- the process of a case


def _ended(pid: int) -> tuple[int, int, bool]:
    """Wait until a case ends: its exit code, the memory that it took, and whether it had to be killed for idleness."""
    seen, idle_since, hung = None, time.monotonic(), False
    start, pause = _memory(pid), 0.001
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)
        now = _work_of(pid)
        if now != seen or now is None:
            seen, idle_since = now, time.monotonic()
        elif time.monotonic() - idle_since > IDLE_S:
            hung = True
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # what it left running
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status), max(0, usage.ru_maxrss * 1024 - start), hung


def _memory(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def _work_of(pid: int) -> tuple[int, ...] | None:
    """The CPU time of a process and of all below it; None while one of them waits for a core, which is no idleness."""
    below, ticks = {pid}, []
    for place in sorted(
        (each for each in Path("/proc").iterdir() if each.name.isdigit()), key=lambda each: int(each.name)
    ):
        with contextlib.suppress(OSError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(place.name) in below or int(fields[1]) in below:
                below.add(int(place.name))
                if fields[0] == "R":
                    return None
                ticks.append(int(fields[11]) + int(fields[12]))
    return tuple(ticks)


def _live(attempt: Attempt, folder: Path, output: Path) -> NoReturn:
    """The life of the process of a case, as that of a command which a shell has started."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        files = [os.open(os.devnull, os.O_RDONLY)]
        files += [os.open(output / name, os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
        for wanted, file in enumerate(files):
            os.dup2(file, wanted)
        os.closerange(3, 4096)
        for name, number in (("stdout", 1), ("stderr", 2)):
            errors = "strict" if number == 1 else "backslashreplace"
            setattr(sys, name, open(number, "w", encoding="utf-8", errors=errors, closefd=False))  # noqa: SIM115
        _set_environment(attempt.environment, folder)
        for closed in attempt.closed:
            os.close(closed)
            setattr(sys, ("stdin", "stdout", "stderr")[closed], None)  # as the interpreter does
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 10))  # SIGXCPU, then SIGKILL
        limits = {resource.RLIMIT_AS: size + 4 * MEMORY, **attempt.limits}
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _become_nobody()
        code = _call(attempt)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        with contextlib.suppress(BaseException):
            sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _call(attempt: Attempt) -> int:
    if attempt.call is not None:
        from clipo_megatron.config.errors import is_for_users

        try:
            attempt.call()
        except Exception as error:
            if not is_for_users(error):
                raise
            print(f"clipo: {error}", file=sys.stderr)
            return 2
        return 0
    from clipo_megatron.cli.main import main

    sys.argv = ["clipo", *attempt.arguments]
    return main(list(attempt.arguments))


def _set_environment(changes: Mapping[str, str | None], folder: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("CLIPO_TEST", "SLURM_", "MASTER_", "PYTEST"))]:
        del os.environ[name]
    beside = {"HOME": str(folder.parent / HOME), "TMPDIR": str(folder.parent / TEMPORARY)}
    os.environ.update(beside, HF_HUB_OFFLINE="1", **warm.ONE_THREAD)
    tempfile.tempdir = None
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _become_nobody() -> None:
    """Give up root's powers, so that no case can harm the machine, and modes of files mean what they say.

    Where others cannot read the interpreter, the power to read everything is kept, by which modules are found.
    """
    if os.geteuid():
        return
    kept = 0 if all(each.stat().st_mode & 1 for each in Path(sys.executable).resolve().parents) else 1 << _READ_ALL
    libc = ctypes.CDLL(None)
    libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(_DUMPABLE, 1, 0, 0, 0)
    words = (ctypes.c_uint32 * 6)(kept, kept, kept)
    if libc.capset((ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0), words):
        raise OSError("the capabilities of root cannot be given up")
    if kept:
        libc.prctl(_AMBIENT, _RAISE, _READ_ALL, 0, 0)


# ---------------------------------------------------------------- by hand


def main() -> int:
    from broken_kinds import KINDS

    parser = argparse.ArgumentParser(description="Run broken things of a kind, and print those that went wrong.")
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", type=int, help="run this case alone, and print all that it says")
    options = parser.parse_args()
    import warm_imports  # noqa: F401

    wrong = 0
    for kind in KINDS if options.kind == "all" else [options.kind]:
        numbers = range(options.count) if options.only is None else [options.only]
        codes: dict[int, int] = {}
        for verdict in verdicts(kind, options.seed, numbers):
            codes[verdict.code] = codes.get(verdict.code, 0) + 1
            wrong += bool(verdict.wrong)
            if verdict.wrong or options.only is not None:
                print(f"{verdict}\n", flush=True)
        print(f"{kind}: {sum(codes.values())} cases, exit codes {dict(sorted(codes.items()))}", flush=True)
    print(f"{wrong} went wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
