"""A process group that trainer ranks share with processes of another program, such as the ranks of an engine's server.

Such a process may hang or die at any moment, and must not take the trainer along. So every wait for it has a deadline
here, and what cannot be interrupted runs in a thread that is left to itself when the deadline has passed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipo_megatron.runtime.platform import Platform, open_store

T = TypeVar("T")
Stop = Callable[[], bool]

_NOTICE_S = 5.0  # after its deadline, a wait that reports a timeout by itself does so within this time


def _never() -> bool:
    return False


class SharedGroupError(RuntimeError):
    """Members of a shared group did not meet, or a broadcast to them failed; the group cannot be used any more."""


class SharedGroup:
    """Rank 0's end of a process group whose other members are processes of another program.

    It does not depend on the default group: it has its own rendezvous, and `close` never waits for other members.
    Members may run another release of torch; only the way in which torch derives the keys of the rendezvous from the
    group's name has to agree, and it has not changed since 2.6.

    Args:
        platform: this process's.
        name: the group's, the same for all members.
        world: number of members, including this one.
        host: address of this machine that the others can reach, and the only one that is listened on.
        timeout_s: limit of every wait: for the members to meet, and for each broadcast.
    """

    def __init__(self, platform: Platform, name: str, *, world: int, host: str, timeout_s: float):
        self.name, self.world, self.host = name, world, host
        self._platform, self._timeout_s = platform, timeout_s
        self._store: dist.TCPStore | None = open_store(host, world=world, timeout_s=timeout_s)
        self.port: int = self._store.port
        self._group: Any = None
        self._connected = False  # whether a broadcast has begun on all members
        self._works: list[dist.Work] = []

    def join(self, stop: Stop = _never) -> None:
        """Wait until all members have joined; on a GPU they connect in the first broadcast.

        Raises:
            SharedGroupError: they did not all join in time, or `stop` returned true.
        """
        self._group = self._bounded(lambda store=self._store: self._connect(store), "meet", stop)

    def broadcast(self, tensor: torch.Tensor, stop: Stop = _never) -> dist.Work:
        """Start to send a contiguous tensor to all members, as bytes; it must not change until `wait` returns.

        The first call returns when all members have made theirs.

        Raises:
            SharedGroupError: in the first call: they did not in time, or `stop` returned true.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        if not self._platform.has_gpu:
            options.timeout = timedelta(seconds=self._timeout_s)

        def begin(group: Any = self._group) -> dist.Work:
            return group.broadcast([tensor.view(torch.uint8)], options)

        work = begin() if self._connected else self._bounded(begin, "connect", stop)
        self._connected = True
        self._works.append(work)
        return work

    def wait(self, work: dist.Work, stop: Stop = _never) -> None:
        """Return when a broadcast is done; on a GPU, kernels that are queued afterwards wait for it as well.

        On a GPU a broadcast to a member that has died may count as done. That member answers nothing either.

        Raises:
            SharedGroupError: it failed, it took longer than the group's timeout, or `stop` returned true.
        """
        end = self._end()
        try:
            while not self._done(work):
                if stop():
                    raise SharedGroupError(f"group {self.name}: cancelled in the middle of a broadcast")
                if time.monotonic() > end:
                    raise SharedGroupError(f"group {self.name}: a broadcast did not end in {self._timeout_s:g} s")
            work.wait()
        except SharedGroupError:
            raise
        except Exception as error:
            raise SharedGroupError(f"group {self.name}: a broadcast failed: {str(error).splitlines()[0]}") from error
        self._works.remove(work)

    def close(self) -> None:
        """Leave the group at once, even in the middle of a broadcast. Idempotent."""
        group, works, store = self._group, self._works, self._store
        self._group, self._works, self._store = None, [], None
        if group is not None:
            # On a GPU a broadcast can be aborted, which may take time. gloo cannot interrupt one, and the group can
            # only be freed after it. A thread waits for either.
            leave = _abort if self._platform.has_gpu else _outlive
            holders = [group, store]
            threading.Thread(target=leave, args=(holders, works), name=f"leave {self.name}", daemon=True).start()

    def _end(self) -> float:
        """When a wait that begins now has failed. On a CPU the library's own timeout comes first, and says more."""
        return time.monotonic() + self._timeout_s + (0.0 if self._platform.has_gpu else _NOTICE_S)

    def _bounded(self, call: Callable[[], T], doing: str, stop: Stop) -> T:
        """What a call returns that nobody can interrupt; in a thread of its own, which outlives the deadline.

        Raises:
            SharedGroupError: it failed, it took longer than the group's timeout, or `stop` returned true.
        """
        answers: list[T] = []
        failure: list[str] = []  # as text, because the exception would keep the store alive
        context = self._platform.stream()

        def run(call: Callable[[], T] = call) -> None:
            try:
                with context:
                    answers.append(call())
            except BaseException as error:
                failure.append(str(error))

        thread = threading.Thread(target=run, name=f"{doing} {self.name}", daemon=True)
        del run, call  # the thread alone holds the store
        thread.start()
        end, members = self._end(), f"group {self.name}: its {self.world} members did not {doing}"
        while thread.is_alive():
            thread.join(0.05)
            if thread.is_alive() and stop():
                raise SharedGroupError(f"group {self.name}: cancelled before its {self.world} members could {doing}")
            if thread.is_alive() and time.monotonic() > end:
                raise SharedGroupError(f"{members} in {self._timeout_s:g} s")
        if failure:
            raise SharedGroupError(f"{members}: {failure[0]}")
        return answers[0]

    def _connect(self, store: dist.Store) -> Any:
        return self._platform.unbound_group(
            store, self.name, world=self.world, host=self.host, timeout_s=self._timeout_s
        )

    def _done(self, work: dist.Work) -> bool:
        if self._platform.has_gpu:
            if not work.is_completed():
                time.sleep(0.001)
            return work.is_completed()
        with contextlib.suppress(RuntimeError):  # it is not done, or it failed: the caller's `work.wait` tells
            work.wait(timedelta(milliseconds=100))
        return work.is_completed()


def _abort(holders: list[Any], works: list[dist.Work]) -> None:
    """Abort a group's broadcasts, and free it."""
    with contextlib.suppress(RuntimeError):
        holders[0].abort()
    works.clear()
    holders.clear()


def _outlive(holders: list[Any], works: list[dist.Work]) -> None:
    """Free a group once none of its broadcasts is in flight."""
    for work in works:
        with contextlib.suppress(RuntimeError):
            work.wait()
    works.clear()
    holders.clear()
