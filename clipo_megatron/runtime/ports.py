"""Ports that this program listens at: below the ephemeral ones, so that no outgoing connection takes one first."""

from __future__ import annotations

import random
import socket

# Linux's ephemeral ports are 32768 and up.
PORTS = range(20_000, 32_000)
LOOPBACK = "127.0.0.1"
_TRIES = 200


class PortError(RuntimeError):
    """No port could be had."""


def listen(host: str) -> socket.socket:
    """A socket that listens at a free port; nobody else can take it between the choice and the use.

    Args:
        host: the address to listen at, IPv4 or IPv6; "" for all of this machine.

    Raises:
        PortError: none of many ports is free, or the address is not one of this machine.
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
    """A port of this machine that nothing listens at, for another program to listen at."""
    with listen(LOOPBACK) as listener:
        return listener.getsockname()[1]
