"""A pool of ranks for tests: processes that stay, and meet in a fresh process group for every case.

Ranks are forks of a server that has imported torch and Megatron; running a case on them takes what the case takes.
A test asks for the `ranks` fixture of conftest.py and runs a function of its own module on the first `world` ranks:

    results = ranks.run(train_a_little, 4, LayoutConfig(tp=2, pp=2))
"""

from __future__ import annotations

import atexit
import gc
import itertools
import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import warm
from progress import STALL_S, Progress

SIZE = 4
COLLECTIVE_TIMEOUT_S = 1800.0
# After one rank has failed, the others may stand still this long: time to notice that their peer is gone.
GRACE_S = 10.0
ALL_ANSWERED = b""  # word to the ranks


class RankError(Exception):
    """One or more ranks raised; the message holds the traceback of each."""


class RankTimeout(RankError):
    """Ranks stood still without an answer; the message names them. They were killed."""


class RankPool:
    """Up to SIZE long-lived processes with one torch thread each; they start with the first case."""

    def __init__(self, size: int = SIZE):
        self.size = size
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []
        self._store: Any = None  # the server end of the ranks' rendezvous
        self._cases = itertools.count()
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], world: int, *args: Any, stall_s: float = STALL_S) -> list[Any]:
        """Call `function(*args)` on ranks 0 .. world-1 and return their results in order of rank.

        Each rank has joined a fresh default process group; the function divides it as it likes
        (`policy.parallel.initialize`), and `policy.parallel.shutdown` follows whatever happens. The ranks' torch
        generator is seeded anew.

        Args:
            function: importable by name. It, its arguments and its results are pickled.
            world: number of ranks, at most the pool's size.
            stall_s: the case fails when no rank has worked for so long.

        Raises:
            RankError: ranks raised. The pool lives on if all of them answered.
            RankTimeout: ranks stood still; the pool is killed and starts again with the next case.
        """
        if not 1 <= world <= self.size:
            raise ValueError(f"world is {world}: this pool has {self.size} ranks")
        self._start()
        case = next(self._cases)
        for rank in range(world):
            self._workers[rank][1].send_bytes(pickle.dumps((case, function, rank, world, args)))
        answers = self._collect(range(world), stall_s, f"{function.__module__}.{function.__qualname__}")
        for _, connection in self._workers:
            connection.send_bytes(ALL_ANSWERED)
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failed:
            report = "\n".join(f"--- rank {rank} of {world}:\n{text}" for rank, text in sorted(failed.items()))
            raise RankError(f"{len(failed)} of {world} ranks raised in {function.__qualname__}:\n{report}")
        return [answers[rank][1] for rank in range(world)]

    def close(self) -> None:
        """Kill the processes. Idempotent; a later `run` starts new ones."""
        workers, self._workers = self._workers, []
        for process, connection in workers:
            process.kill()
            connection.close()
        for process, _ in workers:
            process.join(10)

    def _start(self) -> None:
        if self._workers and all(process.is_alive() for process, _ in self._workers):
            return
        self.close()
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = warm.context()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            # Not a daemon: those may not start the processes that Megatron writes checkpoints with.
            process = context.Process(target=_serve, args=(theirs, self._store.port), name=f"rank {rank}")
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._collect(range(self.size), STALL_S, "the start of the pool")

    def _collect(self, ranks: range, stall_s: float, what: str) -> dict[int, tuple[bool, Any]]:
        """One answer of each rank; kills the pool and raises when some stand still."""
        progress = Progress(lambda: [process.pid for process, _ in self._workers])
        pending = {self._workers[rank][1]: rank for rank in ranks}
        answers: dict[int, tuple[bool, Any]] = {}
        gone: list[int] = []
        while pending and (idle := progress.idle_s()) < stall_s:
            for connection in wait(list(pending), timeout=1.0):
                rank = pending.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self._workers[rank][0].join(1)
                    answers[rank] = (False, f"its process ended with exit code {self._workers[rank][0].exitcode}\n")
                    gone.append(rank)
                if not answers[rank][0]:
                    stall_s = min(stall_s, GRACE_S)
        if pending:
            silent = sorted(pending.values())
            told = "".join(f"\n--- rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok)
            self.close()
            raise RankTimeout(
                f"waited for {what}: no answer from ranks {silent} of {len(ranks)}, which have not worked for "
                f"{idle:.0f} s" + (f"; others raised:{told}" if told else "")
            )
        if gone:
            self.close()
        return answers


def _serve(connection: Connection, port: int) -> None:
    """Run as a rank: receive cases and send back results or tracebacks, until the other end closes."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore

    from clipo_megatron.policy import parallel as layout
    from clipo_megatron.runtime.platform import LOCAL_RENDEZVOUS_ENV, platform

    os.environ |= LOCAL_RENDEZVOUS_ENV
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        if message == ALL_ANSWERED:
            # Groups in reference cycles have threads that wake 100 times per second. Until now others may have been
            # reading what this rank sent. What was imported meanwhile is not looked through again.
            gc.collect()
            gc.freeze()
            continue
        try:
            case, function, rank, world, args = pickle.loads(message)
            torch.manual_seed(0)
            meeting = PrefixStore(f"case{case}", store)
            platform().init_process_group(rank, world, timeout_s=COLLECTIVE_TIMEOUT_S, store=meeting)
            dist.barrier()  # or a rank that is done at once would leave while others still connect
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        layout.shutdown()
        del args
        try:
            reply = pickle.dumps(answer)
        except Exception:
            reply = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(reply)
