"""What Slurm says of this process: the step's hosts, and where its ranks meet."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Mapping

from clipo_megatron.config.errors import ConfigError

_ASK_S = 20.0  # for Slurm's controller


def first_host(nodes: str) -> str:
    """The first host of a node list: "gpu[07-09,12],login" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodes


def node_address(node: str) -> str | None:
    """The address that Slurm itself reaches a node at; None where it does not say."""
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", said)
    return found[1] if found else None


def reachable(node: str, ask: Callable[[str], str | None] = node_address) -> str:
    """A node's name where this machine knows it, else the address that Slurm has for it.

    Raises:
        ConfigError: neither; found out here, and not after the ranks have waited for each other.
    """
    if _resolves(node):
        return node
    address = ask(node)
    if address and _resolves(address):
        return address
    raise ConfigError(
        f"the ranks are to meet on {node}, the first node of the Slurm step, and neither this machine nor Slurm's "
        "controller knows an address for it. Set MASTER_ADDR, or mend the name service of the nodes."
    )


def step_number(environment: Mapping[str, str]) -> int:
    """The same on every rank of a step, and another one in the next step of the job."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return job * 17 + step


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
