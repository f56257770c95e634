"""Finds the Python that runs an engine, and sets up an engine's own virtual environment on machines without a GPU.

Engines and trainer need different versions of the same packages, so an engine never shares the trainer's environment.
On machines with GPUs, users install SGLang or vLLM as its documentation says and name it in `serve.python`.

    python -m clipo_megatron.serving.environment sglang vllm        (what `make engines` runs)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import util
from pathlib import Path

from clipo_megatron.runtime.launch import dies_with_this_process
from clipo_megatron.serving.errors import ServingError

REQUIREMENTS = Path(__file__).with_name("requirements")
FOLDER_VARIABLE, OPTIONS_VARIABLE = "CLIPO_ENVIRONMENTS", "CLIPO_PIP_OPTIONS"
DEADLINE_S = 3600.0
COMPLETE = "complete.json"  # written last; a folder without it is an interrupted setup
_REPORT_EVERY_S = 15.0
_TAIL_LINES = 15
_VERSION_S = 120.0  # for torch to be imported, from a disk that may be slow
_REVISION = 1  # of the steps in `_build`; raise it to have every environment made anew

Say = Callable[[str], None]


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Recipe:
    """How an environment is made: pinned packages, and a program that shows that they are enough."""

    name: str
    requirements: Path  # one `package==version` a line; torch, the first, is installed with its dependencies
    proof: str  # Python source, run in the new environment
    minutes: float  # roughly, on two cores
    gigabytes: float

    @cached_property
    def pins(self) -> tuple[str, ...]:
        """The packages, in the order of the file."""
        lines = (line.partition("#")[0].strip() for line in self.requirements.read_text().splitlines())
        return tuple(line for line in lines if line)

    @property
    def folder(self) -> Path:
        """The environment's folder. Other pins, steps or Pythons have another folder: none is ever changed."""
        python = f"{sys.implementation.cache_tag} {sys.platform} {os.uname().machine}"
        facts = json.dumps([_REVISION, python, self.pins, self.proof])
        return root() / f"{self.name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def is_ready(self) -> bool:
        """Whether the environment is complete, and the Python that it was made from still exists."""
        return (self.folder / COMPLETE).is_file() and self.python.exists()


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("sglang", REQUIREMENTS / "sglang.txt", "import sglang, torch, xgrammar", minutes=2.0, gigabytes=2.5),
        Recipe("vllm", REQUIREMENTS / "vllm.txt", "import vllm, torch", minutes=2.0, gigabytes=2.5),
    )
}


def root(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of all environments: CLIPO_ENVIRONMENTS, or one in the user's cache."""
    return Path(environment.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "clipo-megatron" / "environments")


def ensure(recipe: Recipe, *, say: Say = _print, deadline_s: float = DEADLINE_S) -> Path:
    """Return the Python of the recipe's environment, which is set up first if need be, by one process at a time.

    Raises:
        ServingError: it could not be set up, or not in time.
    """
    if recipe.is_ready:
        return recipe.python
    deadline = time.monotonic() + deadline_s
    try:
        recipe.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServingError(
            f"{recipe.folder.parent} cannot be made: {error}. Name another folder in {FOLDER_VARIABLE}."
        ) from error
    with _only_builder(recipe, deadline, say):
        if not recipe.is_ready:  # it may have been made while this process waited
            _build(recipe, deadline, say)
    return recipe.python


@contextmanager
def _only_builder(recipe: Recipe, deadline: float, say: Say) -> Iterator[None]:
    """Hold the recipe's lock, which the kernel releases when its holder dies."""
    file = recipe.folder.with_suffix(".lock")
    with file.open("a+") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if not told:
                told = True
                say(f"Waiting for another process to set up {recipe.folder}.")
            if time.monotonic() > deadline:
                raise ServingError(
                    f"another process has been setting up {recipe.folder} for the whole deadline. Wait for it, or end "
                    f"it (`fuser {file}` names it)."
                )
            time.sleep(0.2)
        yield


def _build(recipe: Recipe, deadline: float, say: Say) -> None:
    folder, log = recipe.folder, recipe.folder.with_suffix(".log")
    say(
        f"Setting up {recipe.name} in {folder}: once, about {recipe.minutes:.0f} minutes and "
        f"{recipe.gigabytes:.1f} GB of disk."
    )
    started = time.monotonic()
    _clear(folder)  # what an interrupted setup has left
    log.unlink(missing_ok=True)
    options = os.environ.get(OPTIONS_VARIABLE, "").split()
    # What a server imports is compiled when it is first imported; compiling everything takes longer than installing it.
    pip = [str(recipe.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    first, *others = recipe.pins
    # Virtual environments cannot be moved: this one is made where it stays, and is complete with its last file.
    steps: list[tuple[str, Sequence[str]]] = [
        ("making the environment", [sys.executable, "-m", "venv", str(folder)]),
        (f"installing {first}", [*pip, *options, first]),
        (f"installing {len(others)} more packages", [*pip, *options, "--no-deps", *others]),
        ("trying it", [str(recipe.python), "-c", recipe.proof]),
    ]
    try:
        for what, command in steps:
            _run(command, what, recipe, log, started, deadline, say)
    except BaseException:
        _clear(folder)
        raise
    seconds = time.monotonic() - started
    draft = folder / f".{COMPLETE}"
    draft.write_text(json.dumps({"pins": recipe.pins, "seconds": round(seconds, 1)}, indent=1))
    os.replace(draft, folder / COMPLETE)
    say(f"{recipe.name} is set up, after {seconds:.0f} s.")


def _clear(folder: Path) -> None:
    """Remove an incomplete environment. Processes that pip or venv started in it are killed first: they still write."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(f"{folder}/bin/".encode()):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _run(
    command: Sequence[str], what: str, recipe: Recipe, log: Path, started: float, deadline: float, say: Say
) -> None:
    """Run one step as a child that dies with this process, and report every few seconds that it still runs."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
            preexec_fn=dies_with_this_process(),
        )
    try:
        while True:
            seconds_left = deadline - time.monotonic()
            try:
                code = process.wait(timeout=max(0.0, min(seconds_left, _REPORT_EVERY_S)))
                break
            except subprocess.TimeoutExpired:
                if seconds_left <= _REPORT_EVERY_S:
                    raise ServingError(
                        f"setting up {recipe.name} did not end in time, while {what}. {log} holds what pip says; a "
                        "slow network may need another try, which starts over."
                    ) from None
                say(f"  {what}: {time.monotonic() - started:.0f} s of about {60 * recipe.minutes:.0f} s")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code:
        lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
        raise ServingError(
            f"{recipe.name} could not be set up: {what} failed with exit code {code}. Check the network and the disk; "
            f"{OPTIONS_VARIABLE} hands options to pip. The end of {log}:\n{tail}"
        )


def interpreter(engine: str, given: str | None, *, gpus: int, say: Say = _print) -> Path:
    """Return the Python that runs an engine: the `given` one, or this one if it has the engine, or, without a GPU, that
    of the engine's own environment, which is set up if need be.

    Raises:
        ServingError: there is none.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise ServingError(
                f"serve.python = {given} is no program. Give the path of the Python that has {engine}, such as "
                "ENVIRONMENT/bin/python."
            )
        return Path(found)
    if importable(engine):
        return Path(sys.executable)
    if gpus == 0:
        return ensure(RECIPES[engine], say=say)
    raise ServingError(
        f"{engine} is not installed in {sys.executable}, and on a machine with GPUs its setup depends on them. "
        "Install it as its documentation says, in an environment of its own, and name that: "
        "serve.python=ENVIRONMENT/bin/python."
    )


def collectives_version(python: Path) -> str:
    """The release of the library with which this Python connects GPUs; "" if it cannot tell."""
    from clipo_megatron.runtime.platform import COLLECTIVES_VERSION

    command = [str(python), "-I", "-c", COLLECTIVES_VERSION]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_VERSION_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def importable(engine: str) -> bool:
    """Whether this Python has the engine."""
    return util.find_spec(engine) is not None


def main(engines: Sequence[str]) -> int:
    """Set up the environments of the named engines; returns the exit code."""
    try:
        for engine in engines or RECIPES:
            if engine not in RECIPES:
                raise ServingError(f"there is no recipe for {engine!r}. Choose from {', '.join(RECIPES)}.")
            print(ensure(RECIPES[engine]))
    except ServingError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
