"""The `clipo` command: finds the command's file, and turns errors into messages and exit codes.

Each command is a file of this package with `DESCRIPTION` and `EXAMPLES` of its help, `add_arguments` and `run`. Only
the file of the command that is called is imported, and it imports torch as late as it can, so that help and refusals
come at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from clipo_megatron import __version__
from clipo_megatron.config.errors import for_terminal, is_for_users, shortened
from clipo_megatron.runtime.stop_requests import report

USER_ERROR = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what keeps a stream or an open file from being written

COMMANDS = {
    "train": "train a model as a configuration file says",
    "submit": "train as a Slurm job that survives its walltime, preemption and lost ranks",
    "scale": "train on several numbers of nodes, and compare the tokens per second of each GPU",
    "eval": "how many held-out problems a checkpoint solves: pass@1, pass@k, maj@k, set by set",
    "compare": "two results of `clipo eval`, problem by problem: which is better, and could that be luck",
    "report": "runs as one HTML page: curves, accuracies, representation, texts, time",
    "serve": "run the servers that generate for training, SGLang or vLLM",
    "convert": "move weights between Hugging Face and Megatron, in any layout, and verify them",
    "plan": "what a configuration needs and takes on given GPUs, and which layouts fit",
    "settings": "every setting of a configuration: its type, range, default and meaning",
    "methods": "every base method and plug-in: what it changes, its paper, its options",
    "doctor": "what this machine has, and what a run would use of it",
    "prove": "that this machine computes as a CPU does, and how fast, against limits",
}
FILES = {"eval": "evaluate"}  # where a command's file has another name
DESCRIPTION = """\
Contrastive policy optimisation (CLIPO) for reinforcement learning with verifiable rewards, on Megatron.

commands:
""" + "\n".join(f"  {name:<9}  {purpose}" for name, purpose in COMMANDS.items())
EXAMPLES = """\
examples:
  clipo train run.yaml                          one machine; starts its own ranks when the layout needs several
  clipo train run.yaml layout.tp=2 train.steps=50
  clipo train run.yaml --check                  only check the configuration, the model folder and the data
  torchrun --nproc-per-node 8 -m clipo_megatron.cli train run.yaml
  srun --ntasks-per-node 8 clipo train run.yaml
  clipo serve run.yaml                          the servers of a run with rollout.engine=sglang; keeps them running
  clipo submit run.yaml --nodes 4 --gpus-per-node 8    a Slurm job that requeues itself
  clipo scale run.yaml --nodes 1,2,4,8 --gpus-per-node 8    weak and strong scaling, measured
  clipo eval runs/mine/checkpoints/step_000100 eval.samples=16 eval.temperature=0.6
  clipo report runs/grpo runs/clipo             two runs as one HTML page
  clipo settings clipo                          the settings of one section
  clipo prove                                   on a new machine, before anything else

`clipo COMMAND --help` says more. CLIPO_TRACEBACK=1 shows where an error comes from.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose messages show no more of a long word than a terminal can take."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        self.refuse(f"{shortened(message, 1_000)}{end} `{self.prog} --help` shows what there is.")

    def refuse(self, text: str) -> NoReturn:
        """End the command with a text that says all there is to say."""
        self.exit(USER_ERROR, f"clipo: {for_terminal(text)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error that the user can correct, 128 + a signal."""
    options = argparse.Namespace()
    _prepare_streams()
    try:
        options = parse(_readable(sys.argv[1:] if arguments is None else arguments))
        code = options.run(options)
        sys.stdout.flush()  # here, where a full disk is no traceback
        return code
    except KeyboardInterrupt as request:
        return report(request)
    except BrokenPipeError:  # `clipo settings | head`
        _print_nowhere()
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            print(
                f"clipo: output cannot be written: {error.strerror}. Free space, or write elsewhere.", file=sys.stderr
            )
            _print_nowhere()
            return USER_ERROR
        if os.environ.get("CLIPO_TRACEBACK") == "1":
            raise
        if isinstance(error, ModuleNotFoundError) and (package := _absent_package(error)):
            print(
                f"clipo: the package {package} is not installed, and this command needs it. All that commands need "
                "comes with: pip install 'clipo-megatron[train]'",
                file=sys.stderr,
            )
            return USER_ERROR
        if not is_for_users(error):
            raise
        if not _is_told_by_another(options, error):
            print(f"clipo: {_rank_prefix()}{for_terminal(str(error))}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", USER_ERROR)


def _absent_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed; None where it is there, and a module of it is missing."""
    package = (error.name or "").partition(".")[0]
    return package if package and package != "clipo_megatron" and package not in sys.modules else None


def _print_nowhere() -> None:
    """Give up what is left to print, which the interpreter would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_streams() -> None:
    """Lead streams that were closed nowhere, and let the others show what their encoding lacks.

    A file that is opened while a stream is closed would take its number, and get what libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _readable(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments; ends the command where one is no text, which no file that is written could hold."""
    for number, word in enumerate(arguments, start=1):
        try:
            word.encode()
            if "\0" not in word:
                continue
            reason = "a NUL character"
        except UnicodeEncodeError:
            reason = "bytes that are not UTF-8"
        shown = word.encode(errors="backslashreplace").decode().replace("\0", "\\0")
        print(f"clipo: argument {number}, {shown[:60]!r}, holds {reason}. Correct it.", file=sys.stderr)
        sys.exit(USER_ERROR)
    return arguments


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, with the command's function as `run`; exits where they are wrong, or for help."""
    parser = _parser(arguments[0] if arguments else "")
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(USER_ERROR)
    if (word := arguments[0]) not in COMMANDS and not word.startswith("-"):
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        parser.error(f"there is no command {word!r}" + (f". Did you mean {near[0]}?" if near else ""))
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more overrides after an option: `clipo train run.yaml --check layout.tp=2`
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides, rest = [*options.overrides, *rest], []
    if rest:
        _refuse(parser, arguments, rest, submits=hasattr(options, "sbatch"))
    return options


def _refuse(parser: _Parser, arguments: Sequence[str], rest: Sequence[str], *, submits: bool) -> None:
    """End the command for arguments that it does not know; an option of sbatch is shown as it is handed on."""
    options = [word for word in rest if word.startswith("-")]
    parser.prog = f"clipo {arguments[0]}"
    if not submits or not options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    place = arguments.index(options[0])
    value = arguments[place + 1 : place + 2]
    spelled = options[0]
    if "=" not in spelled and value and not value[0].startswith("-") and "=" not in value[0]:
        spelled += f"={value[0]}" if spelled.startswith("--") else value[0]  # --qos=high, -qhigh
    option = shortened(options[0].partition("=")[0], 200)
    parser.refuse(
        f"{option} is no option of `clipo {arguments[0]}`. If it is one of sbatch, hand it on: "
        f"--sbatch={shortened(spelled, 200)}"
    )


def _parser(wanted: str) -> _Parser:
    """The parser of `clipo`, which knows the arguments of the wanted command alone."""
    parser = _Parser(
        "clipo",
        usage="clipo [-h] [--version] COMMAND ...",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipo {__version__}")
    commands = parser.add_subparsers(prog="clipo", help=argparse.SUPPRESS, metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == wanted:
            file = importlib.import_module(f"{__package__}.{FILES.get(name, name)}")
            command.description, command.epilog = file.DESCRIPTION, file.EXAMPLES
            command.set_defaults(run=file.run)
            file.add_arguments(command)
    return parser


def _is_told_by_another(options: argparse.Namespace, error: Exception) -> bool:
    """Whether another rank surely tells the same, so that what the ranks of a launcher print has it once."""
    told_by_rank_0 = getattr(error, "is_the_same_on_all_ranks", False) and os.environ.get("RANK", "0") != "0"
    return told_by_rank_0 or getattr(options, "is_reported_by_another", False)


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if rank.isdecimal() and rank != "0" else ""
