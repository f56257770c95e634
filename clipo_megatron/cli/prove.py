"""`clipo prove`: that this machine computes as a CPU does, and how fast, against a limit for each line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipo_megatron.config.errors import ConfigError, for_terminal, shortened
from clipo_megatron.planning.hardware import Assumptions, Hardware, hardware_of_gpu
from clipo_megatron.runtime.durable_files import refuse_unwritable_file, write_output
from clipo_megatron.runtime.warning_filters import quiet_libraries
from clipo_megatron.serving.gpus import gpus
from clipo_megatron.training.proving.checks import CHECKS, Check, run_check

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig
    from clipo_megatron.training.proving.outcome import Prediction
    from clipo_megatron.weights.spec import ModelSpec

DESCRIPTION = """\
Prove that this machine computes as a CPU does, and measure what `clipo plan` assumes.

Random models, no files of anybody's, one process at a time: versions, attention kernels, tiny models against a CPU,
bf16 against fp32, log-probs, attention, updates and their memory against the plan, snapshots, memory that another
process opens, memory handed back. Each line of the table has its limit, a CPU's where there is no GPU. A check that
crashes is a line that fails. The exit code is 0 only if every limit holds.
"""
EXAMPLES = """\
examples:
  clipo prove                                all checks; writes proof.json
  clipo prove --quick                        a small slice of each
  clipo prove --only updates,attention       some of them
  clipo plan run.yaml --measured proof.json  plan with what was measured
"""
NAMES = tuple(check.name for check in CHECKS)
_PATIENCE, _LEAST_PATIENCE_S = 8, 240.0  # a check that takes so many times its usual time, and so long, is ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small models only, for a first look")
    parser.add_argument("--only", metavar="NAME,NAME", type=_names, default=CHECKS, help=", ".join(NAMES))
    parser.add_argument(
        "--json", metavar="FILE", default="proof.json", help="where the findings go; default proof.json"
    )
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)  # what this command starts for each check
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def _names(text: str) -> tuple[Check, ...]:
    chosen = {name.strip() for name in text.split(",") if name.strip()} or {text}
    if unknown := sorted(chosen - set(NAMES)):
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no check. Choose from {', '.join(NAMES)}")
    if "agreement" in chosen:
        chosen.add("reference")
    return tuple(check for check in CHECKS if check.name in chosen)


def run(options: argparse.Namespace) -> int:
    """Run the checks, print their table, and write what they found.

    Returns:
        0 if every limit holds, else 1.

    Raises:
        ConfigError: the findings cannot be written where they are to go.
    """
    if options.one:
        quiet_libraries()
        (check,) = (each for each in CHECKS if each.name == options.one)
        run_check(check, Path(options.folder), predicted, quick=options.quick)
        return 0
    try:
        refuse_unwritable_file(Path(options.json))  # before minutes of measuring
    except OSError as error:
        raise ConfigError(f"--json {options.json} cannot be written: {error}. Name another file.") from error
    console = Console()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="clipo-prove-") as folder:
        for number, check in enumerate(options.only):
            left = sum(_expected_s(each) for each in options.only[number:])
            about = f"{number + 1} of {len(options.only)}: {check.what}, about {_clock(left)} left"
            console.print(about, style="dim", highlight=False)
            found[check.name] = _run_alone(check, Path(folder), quick=options.quick)
    holds = not any(line["holds"] is False for each in found.values() for line in each["lines"])
    _print(console, found)
    present, _ = gpus()
    measured: dict[str, float] = {}
    for each in found.values():
        measured |= each["measured"]
    proof = {
        "gpu": present[0].partition(",")[0] if present else None,
        "hardware": hardware.name if (hardware := _hardware()) else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": options.quick,
        "holds": holds,
        "measured": measured,
        "checks": found,
    }
    write_output(Path(options.json), json.dumps(proof, indent=1) + "\n")
    lines = [line["holds"] for each in found.values() for line in each["lines"] if line["holds"] is not None]
    verdict = "every limit holds" if holds else f"{lines.count(False)} of {len(lines)} limits DO NOT HOLD"
    console.print(f"\n{verdict}; {options.json} has the findings", highlight=False)
    return 0 if holds else 1


def _expected_s(check: Check) -> float:
    return check.gpu_s if gpus()[0] else check.cpu_s


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _run_alone(check: Check, folder: Path, *, quick: bool) -> dict[str, Any]:
    """What a check finds in a process of its own; a failed line where that crashes, or does not end."""
    from clipo_megatron.runtime.platform import VISIBLE_DEVICES  # with torch, which takes seconds to import

    command = [sys.executable, "-m", "clipo_megatron.cli", "prove", "--one", check.name, "--folder", str(folder)]
    environment = dict(os.environ) | ({VISIBLE_DEVICES: ""} if check.hides_gpu else {})
    start, patience = time.monotonic(), max(_LEAST_PATIENCE_S, _PATIENCE * _expected_s(check))
    with (folder / f"{check.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, *(["--quick"] if quick else [])], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        said = [line.strip() for line in log.read().splitlines() if line.strip()]
    answer = folder / f"{check.name}.json"
    if code == 0 and answer.is_file():
        found = json.loads(answer.read_text())
    else:
        ended = f"did not end within {patience:.0f} s" if code is None else f"ended with exit code {code}"
        why = for_terminal(shortened(said[-1], 400)) if said else "it said nothing"
        failed = {"what": check.what, "measured": ended, "limit": "ends", "holds": False, "note": why}
        found = {"lines": [failed], "measured": {}, "log": said[-60:]}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _print(console: Console, found: dict[str, dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("check", "", "measured", "limit", "", ""):
        table.add_column(name, overflow="fold")
    words = {True: "holds", False: "[bold red]FAILS[/bold red]", None: ""}
    for name, each in found.items():
        for line in each["lines"]:
            cells = (name, line["what"], line["measured"], line["limit"])
            table.add_row(*map(escape, cells), words[line["holds"]], f"[dim]{escape(line['note'])}[/dim]")
            name = ""
    console.print(table, highlight=False)


def _hardware() -> Hardware | None:
    present, _ = gpus()
    return hardware_of_gpu(present[0]) if present else None


def predicted(config: RunConfig, spec: ModelSpec, context: float) -> Prediction:
    """What the plan says of a model in training on one rank, whose tokens see `context` others on average."""
    from clipo_megatron.planning.activations import Kernels
    from clipo_megatron.planning.memory import flops_per_token, trainer_memory
    from clipo_megatron.runtime.platform import platform
    from clipo_megatron.training.proving.outcome import Prediction
    from clipo_megatron.weights.parallel_division import ParallelDivision

    kernels = (Kernels.on_gpus if platform().has_gpu else Kernels.on_cpus)(config.megatron)
    (memory,) = trainer_memory(config, spec, ParallelDivision.of(config.layout), 1, Assumptions(), kernels=kernels)
    hardware = _hardware()
    return Prediction(memory.parts, 3 * flops_per_token(spec, context), hardware.flops if hardware else None)
