"""The rendezvous of ranks.

In a Slurm job, rank 0 chooses a port and writes it into the job's folder. It listens at the port from the moment it
chooses it, so that it cannot clash with another job's. The other ranks wait for the file, and every rank reports what
it waited for in vain.

On one machine, rank 0 listens at MASTER_PORT of loopback alone, because whoever reaches the store can end the run.
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
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.ports import LOOPBACK, is_loopback, listen

JOB = "CLIPO_JOB"  # environment variable with the job's folder, set by its script
FOLDER = "rendezvous"  # below the job's folder
_TORCHRUN = "TORCHELASTIC_USE_AGENT_STORE"  # "True" where torchrun's agent keeps the store
TIMEOUT_S = 600.0  # between the first rank and the last: a node may have to load a container first
_POLL_S = 0.2


class RendezvousError(RuntimeError):
    """The ranks did not find each other; the message says which rank waited for which, and where."""


def meet(timeout_s: float) -> None:
    """Join the default process group, whose members are all ranks, as the environment says.

    Args:
        timeout_s: limit of its collectives, and of the wait for the other ranks where torch finds them.

    Raises:
        RendezvousError: the ranks did not find each other.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = rendezvous()
    try:
        platform().init_process_group(rank, world, timeout_s=timeout_s, store=store)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RendezvousError(
            f"rank {rank} of {world} does not meet the others at MASTER_ADDR:MASTER_PORT = {place}: {reason}. Give all "
            "ranks the same address, and a port at which nothing else listens."
        ) from error


def rendezvous(environment: Mapping[str, str] = os.environ, *, timeout_s: float = TIMEOUT_S) -> dist.Store | None:
    """Wait for all ranks of a job or of a run on one machine, and return the store that they share.

    Args:
        environment: has RANK, WORLD_SIZE and MASTER_ADDR, and in a job CLIPO_JOB and Slurm's numbers of the step.
        timeout_s: how long to wait for the other ranks.

    Returns:
        The store; None where torch does it by itself: under torchrun, or on several machines with MASTER_PORT.

    Raises:
        RendezvousError: some rank did not come in time, or MASTER_PORT is taken.
    """
    if "MASTER_PORT" in environment:
        is_local = is_loopback(environment.get("MASTER_ADDR", "")) and environment.get(_TORCHRUN) != "True"
        return _on_loopback(environment, timeout_s) if is_local else None
    if JOB not in environment:
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
        _await_rank_0(store, here, rank, world, deadline, timeout_s)
    return store


def _on_loopback(environment: Mapping[str, str], timeout_s: float) -> dist.TCPStore:
    rank, world, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    timeout = timedelta(seconds=timeout_s)
    try:
        if rank:
            return dist.TCPStore(LOOPBACK, port, world, is_master=False, timeout=timeout)
        with socket.create_server((LOOPBACK, port), backlog=1024) as listener:
            return dist.TCPStore(
                LOOPBACK, port, world, is_master=True, wait_for_workers=False, timeout=timeout,
                master_listen_fd=listener.detach(),
            )  # fmt: skip
    except (OSError, OverflowError, RuntimeError, dist.DistError) as error:
        what = "cannot listen at" if rank == 0 else "does not reach rank 0 at"
        raise RendezvousError(
            f"rank {rank} of {world} {what} {LOOPBACK}:{port}: {str(error).splitlines()[0]}. Set MASTER_PORT to a free "
            "port, the same on all ranks."
        ) from error


def _step(environment: Mapping[str, str]) -> str:
    """A name that differs between steps, attempts and jobs."""
    return ".".join(environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))


def _open(file: Path, host: str, here: str, world: int) -> dist.TCPStore:
    # A name may resolve to different addresses on different nodes, so all but loopback listen at every address.
    with listen(LOOPBACK if is_loopback(host) else "") as listener:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host, port, world, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(),
            timeout=timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, json.dumps({"host": host, "port": port, "node": here}))
    except OSError as error:
        raise RendezvousError(
            f"rank 0 on {here} cannot write its address for the other ranks: {error}. Free space, or choose another "
            "train.output."
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
                os.scandir(file.parent.parent).close()  # makes a network file system refresh the folder
            time.sleep(_POLL_S)
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
            reason = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {world} did not come within"
            store.set("word", f"{reason} {timeout_s:.0f} s")
            raise RendezvousError(f"{reason} {timeout_s:.0f} s. Their logs, beside this one, may say why.")
        time.sleep(_POLL_S / 4)
    store.set("word", "")


def _await_rank_0(store: dist.TCPStore, here: str, rank: int, world: int, deadline: float, timeout_s: float) -> None:
    left = max(1.0, deadline - time.monotonic()) + 10.0  # rank 0 reports first
    try:
        store.wait(["word"], timedelta(seconds=left))
        reason = store.get("word").decode()
    except (RuntimeError, dist.DistError) as error:
        raise RendezvousError(
            f"rank {rank} of {world}, on {here}, came, and rank 0 was gone: {str(error).splitlines()[0]}"
        ) from error
    if reason:
        raise RendezvousError(reason)
