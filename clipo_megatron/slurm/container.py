"""Containers: what a job's steps run within, and which folders they see there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipo_megatron.slurm.resources import Resources, SlurmError, shared_paths

PYXIS, APPTAINER, SINGULARITY = "pyxis", "apptainer", "singularity"
RUNTIMES = (PYXIS, APPTAINER, SINGULARITY)
IMAGE_DEADLINE_S = 1800  # for all nodes to have the image: the first time they load and unpack it
# Puts the checkout before whatever the image has on its path, and becomes the command.
_FROM_CHECKOUT = 'export PYTHONPATH=$0${PYTHONPATH:+:$PYTHONPATH}; exec "$@"'
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/sbin", "/etc", "/")


def runtime_of(resources: Resources) -> str:
    """Name what starts the container: what was asked for, else Apptainer for *.sif and pyxis for other images."""
    return resources.container_runtime or (APPTAINER if resources.container.endswith(".sif") else PYXIS)


def image_of(container: str) -> str:
    """Return the image, a file by its absolute path: pyxis takes a name without a slash for one of a registry.

    Raises:
        SlurmError: it is written like a file, and there is none.
    """
    path = Path(container)
    if "://" in container or not (path.is_file() or path.suffix in (".sqsh", ".sqfs", ".squashfs", ".sif")):
        return container
    if not path.exists():
        raise SlurmError(f"--container {container}: there is no such image below {Path.cwd()}. Correct the path.")
    return os.path.abspath(path)


def checkout() -> Path | None:
    """The repository that this package runs from; None for an installed package."""
    root = Path(__file__).absolute().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


def environment_folders(python: str) -> list[Path]:
    """The folders that an interpreter needs: its environment's, and those of the interpreter behind it."""
    file = Path(python)
    if not file.is_absolute():
        return []
    places = [file.parent.parent, file.resolve().parent.parent]
    return [each for each in dict.fromkeys(places) if each.is_dir() and str(each) not in _SYSTEM]


def mounted(
    resources: Resources, output: Path, inputs: Iterable[str | Path | None], pythons: Iterable[str]
) -> list[str]:
    """List the mounts, HOST:INSIDE: checkout, environments, the folders of the configuration, and the user's own."""
    places = [checkout(), *(folder for python in pythons for folder in environment_folders(python)), *inputs]
    found = [f"{path}:{path}" for path in shared_paths(output, *places) if path not in _SYSTEM]
    for mount in resources.mounts:
        host, _, inside = mount.partition(":")
        found.append(f"{os.path.abspath(host)}:{inside}")
    for mount in found:
        if "," in mount or "\n" in mount:
            raise SlurmError(
                f"the folder {mount.partition(':')[0]!r} cannot be mounted: its name has a comma. Rename it."
            )
    return found


def steps_within(resources: Resources, mounts: Sequence[str]) -> list[str]:
    """What stands between srun's own options and the command of a step: pyxis's options, or Apptainer's command."""
    image, runtime = image_of(resources.container), runtime_of(resources)
    if runtime == PYXIS:
        return [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
    gpus = ["--nv"] if resources.gpus_per_node else []
    return [runtime, "exec", *gpus, f"--bind={','.join(mounts)}", image]


def command_within(python: str) -> list[str]:
    """The command `clipo` in a container: of the mounted checkout, or of the image for an installed package."""
    command = [python or "python3", "-m", "clipo_megatron.cli"]
    return ["bash", "-c", _FROM_CHECKOUT, str(root), *command] if (root := checkout()) else command


def environments(resources: Resources) -> list[str]:
    """The interpreters whose environments a container sees: the one named by --python, else this one."""
    return [resources.python or sys.executable]
