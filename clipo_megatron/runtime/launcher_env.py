"""Reads from the environment whether this process is a rank, and which; completes it for `torch.distributed`.

A rank is started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK), by srun (SLURM_PROCID and the step's number of tasks), or
by `launch.supervise`, which sets torchrun's variables. What the variables say is judged here, in one sentence, because
libraries answer a wrong one with a traceback or by waiting. Imports no torch.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from clipo_megatron.config.errors import ConfigError, spell
from clipo_megatron.runtime import slurm_env as slurm
from clipo_megatron.runtime.ports import LOOPBACK, PORTS, free_port, is_loopback, resolution_error

CHECKED = "CLIPO_CHECKED"  # set for ranks whose parent has checked what they read
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun
_MOST_RANKS = 1 << 20
_MOST_THREADS = 4096
# That a process needs, and that are plenty: on the CPU each rank is connected with every other one, in a few groups.
_OPEN_FILES, _MORE_OPEN_FILES = 256, 16384
_RELAUNCH = "Start under torchrun or srun, or unset it"


@dataclass(frozen=True, slots=True)
class Launch:
    """Rank numbers of this process."""

    rank: int
    world: int
    local_rank: int


def this_process() -> Launch | None:
    """The rank that a launcher gave this process, if any, once its environment and its limits are found usable.

    Raises:
        ConfigError: they are not; names the variable or the limit.
    """
    _check_threads(os.environ)
    _ensure_open_files()
    place = from_environment()
    if place is not None:
        _check_address(os.environ)
    return place


def from_environment(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The rank that torchrun or srun gave this process; None if there is no launcher.

    A batch script or the shell of an allocation is no rank: only srun sets the step's number of tasks. A step of one
    task, `srun clipo train`, is none either, for it may start local ranks of its own.

    Raises:
        ConfigError: the variables make no rank, or contradict each other.
    """
    torch_names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = torch_names
    elif "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        tasks = environment["SLURM_STEP_NUM_TASKS"]
        if environment.get("WORLD_SIZE", tasks) != tasks:
            said = f"WORLD_SIZE={environment['WORLD_SIZE']} and SLURM_STEP_NUM_TASKS={tasks}"
            raise ConfigError(f"the launcher's variables contradict each other: {said}. Unset WORLD_SIZE.")
    else:
        for name, missing in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK"), ("LOCAL_RANK", "RANK")):
            if name in environment and (name != "LOCAL_RANK" or _number(environment[name]) is None):
                raise ConfigError(
                    f"{name}={environment[name]} is set and {missing} is not, so this process has no place among the "
                    f"ranks. {_RELAUNCH}."
                )
        return None
    values = [environment.get(name, "0") for name in names]
    rank, world, local = map(_number, values)
    if rank is None or world is None or local is None or not max(rank, local) < world <= _MOST_RANKS:
        given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ConfigError(
            f"the launcher's variables make no rank: {given}. {names[0]} and {names[2]} count from 0 to below "
            f"{names[1]}, which is at most {_MOST_RANKS}. Start under torchrun or srun, or unset them."
        )
    return Launch(rank, world, local)


def export_environment(
    launch: Launch, environment: MutableMapping[str, str] = os.environ, *, servers_elsewhere: bool = False
) -> None:
    """Set the variables that `torch.distributed` reads, where absent: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

    MASTER_ADDR is the first host of a Slurm step, and MASTER_PORT is derived from the ids of job and step; jobs of
    `clipo submit` need no port (see rendezvous.py). A process without a launcher meets nobody, and uses this machine.
    Ranks that meet on loopback stay there, but with `servers_elsewhere` their GPUs reach servers on other machines.

    Raises:
        ConfigError: there are several ranks and no rendezvous address, or a device's variable names none.
    """
    if launch.world == 1 and "RANK" not in environment:
        environment["MASTER_ADDR"], environment["MASTER_PORT"] = LOOPBACK, str(free_port())
    for name, value in (("RANK", launch.rank), ("WORLD_SIZE", launch.world), ("LOCAL_RANK", launch.local_rank)):
        environment.setdefault(name, str(value))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if launch.world == 1:
        environment.setdefault("MASTER_ADDR", LOOPBACK)
        environment.setdefault("MASTER_PORT", str(free_port()))
    elif "SLURM_PROCID" in environment and nodes:
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = slurm.reachable(slurm.first_host(nodes))
        if "CLIPO_JOB" not in environment:
            environment.setdefault("MASTER_PORT", str(PORTS[slurm.step_number(environment) % len(PORTS)]))
    elif "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise ConfigError(
            f"rank {launch.rank} of {launch.world} has no rendezvous address: MASTER_ADDR and MASTER_PORT are not set. "
            "Start under torchrun or srun, or set both."
        )
    if is_loopback(environment["MASTER_ADDR"]):
        from clipo_megatron.runtime.platform import DEVICE_INTERFACE, LOCAL_RENDEZVOUS_ENV

        for name, value in LOCAL_RENDEZVOUS_ENV.items():
            if name != DEVICE_INTERFACE or not servers_elsewhere:
                environment.setdefault(name, value)
    _check_devices(environment)


def leads(place: Launch | None) -> bool:
    """Whether this process is the one of a run that checks what it reads: the parent of its ranks, or else rank 0."""
    return CHECKED not in os.environ and (place is None or place.rank == 0)


def is_reported_by_another(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another rank of this machine finds the same before the ranks meet: torchrun started it likewise."""
    return _TORCHRUN in environment and environment.get("LOCAL_RANK", "0") != "0"


def _number(text: str) -> int | None:
    """A number as launchers write it; None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _check_address(environment: Mapping[str, str]) -> None:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if port is not None and not 0 < (_number(port) or 0) < 1 << 16:
        raise ConfigError(f"MASTER_PORT={port} is no port, which is a number from 1 to 65535. {_RELAUNCH}.")
    if host is not None and (reason := resolution_error(host)):
        raise ConfigError(f"MASTER_ADDR={spell(host)} is no host that this machine can reach: {reason}. {_RELAUNCH}.")


def _check_threads(environment: Mapping[str, str]) -> None:
    threads = environment.get("OMP_NUM_THREADS", "1")
    if not all(0 < (_number(each.strip()) or 0) <= _MOST_THREADS for each in threads.split(",")):
        raise ConfigError(
            f"OMP_NUM_THREADS={threads} is no number of threads, from 1 to {_MOST_THREADS}. Correct or unset it."
        )


def _check_devices(environment: Mapping[str, str]) -> None:
    """Judge what the device libraries would take for no device, or for no network, without a word."""
    from clipo_megatron.runtime.platform import INTERFACE, VISIBLE_DEVICES, are_device_names

    devices = environment.get(VISIBLE_DEVICES, "")
    if not are_device_names(devices):
        raise ConfigError(
            f"{VISIBLE_DEVICES}={devices} names no GPUs: they are numbers, or names such as GPU-1a2b, with commas "
            "between them, and nothing hides all. Correct or unset it."
        )
    known = [name for _, name in socket.if_nameindex()]
    chosen = environment.get(INTERFACE)
    if chosen is not None and not all(name in known for name in chosen.split(",")):
        raise ConfigError(
            f"{INTERFACE}={chosen} is no network interface of this machine, which has {', '.join(known)}. Correct or "
            "unset it."
        )


def _ensure_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MORE_OPEN_FILES:
        return
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        raise ConfigError(
            f"ulimit -n is {hard}: a process may open so many files, and a rank needs about {_OPEN_FILES}. Raise it: "
            f"ulimit -n {_MORE_OPEN_FILES}."
        )
    more = _MORE_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MORE_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
