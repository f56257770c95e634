"""Where the ranks of a Slurm job meet: at a port that rank 0 chooses and writes into the job's folder.

Rank 0 holds the port from the moment of the choice, so it cannot clash with another job's. The others wait for the
file, and everybody says what was waited for when it does not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.runtime.ports import LOOPBACK, listen

JOB = "CLIPO_JOB"  # the environment variable with the job's folder, which its script sets
FOLDER = "rendezvous"  # below it
MEET_S = 600.0  # between the first rank and the last: a node may have to load a container first
_LOOK_S = 0.2


class RendezvousError(RuntimeError):
    """The ranks did not meet; the message says who waited for whom, and where."""


def meet(environment: Mapping[str, str] = os.environ, *, timeout_s: float = MEET_S) -> dist.Store | None:
    """The store that all ranks of a job share, once all of them are there.

    Args:
        environment: with RANK, WORLD_SIZE and MASTER_ADDR, and, in a job, CLIPO_JOB and Slurm's numbers of the step.
        timeout_s: for the ranks to come.

    Returns:
        The store; None outside a job, or where MASTER_PORT says already where the ranks meet.

    Raises:
        RendezvousError: they did not all come in time.
    """
    if JOB not in environment or "MASTER_PORT" in environment:
        return None
    rank, world, host = int(environment["RANK"]), int(environment["WORLD_SIZE"]), environment["MASTER_ADDR"]
    here = environment.get("SLURMD_NODENAME") or socket.gethostname()
    file = Path(environment[JOB]) / FOLDER / f"{_step(environment)}.json"
    deadline = time.monotonic() + timeout_s
    store = _open(file, host, here, world) if rank == 0 else _find(file, host, here, rank, world, deadline, timeout_s)
    store.set(f"came/{rank}", here)
    if rank == 0:
        _await_all(store, world, deadline, timeout_s)
    else:
        _await_word(store, here, rank, world, deadline, timeout_s)
    return store


def _step(environment: Mapping[str, str]) -> str:
    """Another one for each step of each attempt of each job."""
    return ".".join(environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))


def _open(file: Path, host: str, here: str, world: int) -> dist.TCPStore:
    # A name may stand for one address here and for another elsewhere: all but loopback listen everywhere.
    with listen(LOOPBACK if host in (LOOPBACK, "localhost") else "") as listener:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host, port, world, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(),
            timeout=timedelta(seconds=MEET_S),
        )  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, json.dumps({"host": host, "port": port, "node": here}))
    except OSError as error:
        raise RendezvousError(
            f"rank 0 on {here} cannot say where the ranks meet: {error}. Free space, or choose another train.output."
        ) from error
    return store


def _find(file: Path, host: str, here: str, rank: int, world: int, deadline: float, timeout_s: float) -> dist.TCPStore:
    while True:
        try:
            port = json.loads(file.read_text())["port"]
            break
        except (OSError, ValueError, KeyError):
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {rank} of {world}, on {here}, waited {timeout_s:.0f} s for rank 0 to write {file}. Either "
                    f"rank 0 has not started (logs/rank0.log beside it says), or this folder is not the same on {here}."
                ) from None
            with contextlib.suppress(OSError):
                os.scandir(file.parent.parent).close()  # a network file system looks again
            time.sleep(_LOOK_S)
    try:
        left = max(1.0, deadline - time.monotonic())
        return dist.TCPStore(host, port, world, is_master=False, timeout=timedelta(seconds=left))
    except (RuntimeError, dist.DistError) as error:
        raise RendezvousError(
            f"rank {rank} of {world}, on {here}, does not reach rank 0 at {host}:{port}: "
            f"{str(error).splitlines()[0]}. Let the nodes reach each other's ports."
        ) from error


def _await_all(store: dist.TCPStore, world: int, deadline: float, timeout_s: float) -> None:
    while missing := [rank for rank in range(world) if not store.check([f"came/{rank}"])]:
        if time.monotonic() > deadline:
            word = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {world} did not come within"
            store.set("word", f"{word} {timeout_s:.0f} s")
            raise RendezvousError(f"{word} {timeout_s:.0f} s. Their logs, beside this one, may say why.")
        time.sleep(_LOOK_S / 4)
    store.set("word", "")


def _await_word(store: dist.TCPStore, here: str, rank: int, world: int, deadline: float, timeout_s: float) -> None:
    left = max(1.0, deadline - time.monotonic()) + 10.0  # rank 0's deadline comes first
    try:
        store.wait(["word"], timedelta(seconds=left))
        word = store.get("word").decode()
    except (RuntimeError, dist.DistError) as error:
        raise RendezvousError(
            f"rank {rank} of {world}, on {here}, came, and rank 0 was gone: {str(error).splitlines()[0]}"
        ) from error
    if word:
        raise RendezvousError(word)
