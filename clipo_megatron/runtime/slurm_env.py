"""Facts from Slurm about this process: the hosts of its step, their addresses, and the step's number."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.runtime.ports import resolution_error

_SCONTROL_TIMEOUT_S = 20.0


def first_host(nodes: str) -> str:
    """The first host of a node list: "gpu[07-09,12],login" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodes


def node_address(node: str) -> str | None:
    """The address at which Slurm reaches a node; None if Slurm does not tell."""
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", said)
    return found[1] if found else None


def reachable(node: str, ask: Callable[[str], str | None] = node_address) -> str:
    """A name or address of a node that this machine can resolve: its own name, or else the address that Slurm has.

    Raises:
        ConfigError: neither can be resolved. Reported here, before ranks wait for each other in vain.
    """
    if not resolution_error(node):
        return node
    address = ask(node)
    if address and not resolution_error(address):
        return address
    raise ConfigError(
        f"the ranks are to rendezvous on {node}, the first node of the Slurm step, and neither this machine nor "
        "Slurm's controller knows an address for it. Set MASTER_ADDR, or repair the name service of the nodes."
    )


def step_number(environment: Mapping[str, str]) -> int:
    """A number that all ranks of a step share, and that differs between the steps of a job.

    Raises:
        ConfigError: the ids of job and step are no numbers.
    """
    numbers = []
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        value = environment.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            raise ConfigError(f"{name}={value} is no number, as srun sets it. Start under srun, or unset SLURM_PROCID.")
        numbers.append(int(value))
    return numbers[0] * 17 + numbers[1]
