"""Ranks on one machine listen on loopback alone: for their store, and for each other."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import warm

from clipo_megatron.runtime.platform import LOCAL_RENDEZVOUS_ENV, platform
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.runtime.rendezvous import rendezvous

LISTENS, LOOPBACK = "0A", "0100007F"  # as the kernel spells a socket's state and its address


def listening() -> list[str]:
    """The addresses at which this process listens."""
    links = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    own = {link.removeprefix("socket:[").rstrip("]") for link in links}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    sockets = [line.split() for table in tables for line in table]
    return [fields[1].partition(":")[0] for fields in sockets if fields[3] == LISTENS and fields[9] in own]


def join(rank: int, port: int, connection: Connection) -> None:
    os.environ |= LOCAL_RENDEZVOUS_ENV
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    platform().init_process_group(rank, 2, timeout_s=600, store=rendezvous())
    dist.all_reduce(torch.ones(1))
    connection.send(listening())
    connection.recv()


def test_two_ranks_that_communicate_listen_on_loopback_alone():
    context, port = warm.context(), free_port()
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [context.Process(target=join, args=(rank, port, theirs)) for rank, (_, theirs) in enumerate(pipes)]
    for each in ranks:
        each.start()
    found = [ours.recv() for ours, _ in pipes]
    for ours, _ in pipes:
        ours.send(None)
    for each in ranks:
        each.join()
    assert found[0].count(LOOPBACK) >= 1, "rank 0 keeps the store"
    assert {address for addresses in found for address in addresses} == {LOOPBACK}
