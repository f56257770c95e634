"""Ports to listen at, below the ephemeral ones, so that no outgoing connection can have taken one."""

from __future__ import annotations

import ipaddress
import random
import socket
import threading

# Linux's ephemeral ports are 32768 and up.
PORTS = range(20_000, 32_000)
LOOPBACK = "127.0.0.1"
_TRIES = 200
_RESOLUTION_S = 15.0


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def resolution_error(host: str) -> str:
    """Why a host's name cannot be resolved; empty if it can. A name service that does not answer is given up."""
    found: list[str] = []

    def ask() -> None:
        try:
            socket.getaddrinfo(host, None)
            found.append("")
        except (OSError, UnicodeError) as error:
            found.append(getattr(error, "strerror", None) or str(error))

    asking = threading.Thread(target=ask, name="resolve", daemon=True)
    asking.start()
    asking.join(_RESOLUTION_S)
    return found[0] if found else f"the name service did not answer within {_RESOLUTION_S:.0f} s"


class PortError(RuntimeError):
    """No port is free."""


def listen(host: str) -> socket.socket:
    """Open a socket that listens at a free port; nobody can take the port between choice and use.

    Args:
        host: the IPv4 or IPv6 address to listen at; "" for all addresses of this machine.

    Raises:
        PortError: no port of many was free, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason = ""
    for port in random.SystemRandom().sample(PORTS, k=_TRIES):
        try:
            return socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            reason = str(error)
    raise PortError(
        f"nothing can listen at {host or 'this machine'}: {_TRIES} ports between {PORTS.start} and {PORTS.stop} were "
        f"tried, and the last one said: {reason}. Correct the address, or free ports."
    )


def free_port() -> int:
    """Find a port at which nothing listens, for another program to listen at."""
    with listen(LOOPBACK) as listener:
        return listener.getsockname()[1]
