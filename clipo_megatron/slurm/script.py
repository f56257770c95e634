"""The script of a job: one of the templates in `scripts/`, with the job's own directives and settings filled in.

Templates are shell with three kinds of lines that are replaced: `#@directives` (and `#@server-directives`),
`#@settings` and `#@include FILE`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipo_megatron.config.errors import CONTROL
from clipo_megatron.slurm.resources import JobKind, Resources, SlurmError

TEMPLATES = Path(__file__).parent / "scripts"

Setting = str | int | Sequence[str]


def template_of(kind: JobKind, resources: Resources) -> str:
    """File name of the template for a job."""
    if kind.converts:
        return "conversion.sbatch"
    if kind is JobKind.evaluation:
        return "evaluation.sbatch"
    return "disaggregated.sbatch" if resources.server_nodes else "colocated.sbatch"


def render(
    template: str, *, directives: Mapping[str, Sequence[str]], settings: Mapping[str, Setting], setup: str
) -> str:
    """The script of one job.

    Args:
        template: file name of the template.
        directives: options of sbatch, by the marker of the line that they replace.
        settings: shell variables; a sequence becomes an array.
        setup: shell lines that follow the settings.

    Raises:
        SlurmError: the template, or a file that it includes, is missing, or a value has a control character.
    """
    lines: list[str] = []
    for line in _read(template).splitlines():
        marker, _, argument = line.removeprefix("#@").partition(" ") if line.startswith("#@") else ("", "", "")
        if marker == "settings":
            lines += [f"{name}={_shell(_one_line(name, value))}" for name, value in settings.items()]
            lines += setup.splitlines()
        elif marker == "include":
            lines += _read(argument).splitlines()
        elif marker:
            lines += [f"#SBATCH {_one_line('an option of sbatch', option)}" for option in directives[marker]]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def directives_of(name: str, job: Path, resources: Resources) -> dict[str, list[str]]:
    """Options of sbatch by marker: for the nodes that train, and for those that only serve."""
    ranks, cores = resources.ranks_a_node, resources.cpus_per_rank
    common = [
        f"--{option}={value}" for option, value in (("time", resources.time), ("account", resources.account)) if value
    ]
    kind = f"{resources.gpu_type}:" if resources.gpu_type else ""
    common += [f"--gpus-per-node={kind}{resources.gpus_per_node}"] if resources.gpus_per_node else []
    common += ["--exclusive"] if resources.whole_nodes else []
    common += [*resources.memory_options, *resources.options]
    stop = [f"--signal=B:USR1@{resources.stop_before_s}"] if resources.stop_before_s else []
    train = [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.-]', '-', name)}",
        f"--output={job / 'job.log'}",
        f"--nodes={resources.nodes}",
        f"--ntasks-per-node={ranks}",
        *([f"--cpus-per-task={cores}"] if cores else []),
        *_partition(resources.partition),
        *stop,
        *common,
    ]
    servers = [
        f"--nodes={resources.server_nodes}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={cores * ranks}"] if cores else []),
        *_partition(resources.server_partition or resources.partition),
        *common,
        *resources.server_options,
    ]
    return {"directives": train, "server-directives": servers}


def _one_line(name: str, value: Setting) -> Setting:
    """The value, if it stays on its line of the script; a SlurmError if it does not."""
    for part in (value,) if isinstance(value, str | int) else value:
        if CONTROL.search(str(part)):
            raise SlurmError(
                f"{part!r} ({name}) has a control character, such as the end of a line, and would become other lines "
                "of the job's script. Remove it."
            )
    return value


def _partition(name: str) -> list[str]:
    return [f"--partition={name}"] if name else []


def _shell(value: Setting) -> str:
    if isinstance(value, str):
        return shlex.quote(value)
    return str(value) if isinstance(value, int) else f"({shlex.join(value)})"


def _read(name: str) -> str:
    try:
        return (TEMPLATES / name).read_text()
    except OSError as error:
        raise SlurmError(
            f"a template of job scripts is missing: {error}. Install the package again, or run from its repository."
        ) from error
