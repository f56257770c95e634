"""A group on GPUs outlives members that hang: nothing that blocks runs in the thread of the run, and our clock decides.

NCCL's process group is stood in for by one that behaves as torch 2.13's does (ProcessGroupNCCL.cpp): the constructor
returns at once and reads how errors are handled, the first collective blocks until all members have made theirs, and
the watchdog ends the process when a collective outlasts the group's timeout.
"""

import contextlib
import os
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from clipo_megatron.runtime.platform import Platform
from clipo_megatron.runtime.shared_group import SharedGroup, SharedGroupError

TIMEOUT_S = 0.3


class Broadcast:
    """One that ends when the group is told to; the watchdog's limit is that of its group."""

    def __init__(self, group):
        self.group = group

    def is_completed(self):
        return self.group.delivers

    def wait(self):
        pass


class NcclGroup:
    """What a test sets is what its members do."""

    all: list = []  # noqa: RUF012

    class Options:
        _timeout = timedelta(minutes=10)
        group_name = ""

    def __init__(self, store, rank, world, options):
        self.watchdog_s, self.handling = options._timeout.total_seconds(), os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
        self.thread, self.members, self.delivers, self.abort_ends = None, threading.Event(), False, threading.Event()
        self.aborted = threading.Event()
        self.all.append(self)

    def broadcast(self, tensors, options):
        self.thread = threading.current_thread()
        self.members.wait()
        return Broadcast(self)

    def abort(self):
        self.aborted.set()
        self.abort_ends.wait()


@pytest.fixture
def group(monkeypatch):
    """A group of two on a GPU, joined, and the stand-in below it."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", NcclGroup, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    NcclGroup.all.clear()
    shared = SharedGroup(
        Platform("cuda", torch.device("cpu"), "nccl"), "of-two", world=2, host="127.0.0.1", timeout_s=TIMEOUT_S
    )
    shared.join()
    yield shared, NcclGroup.all[0]
    NcclGroup.all[0].members.set()
    NcclGroup.all[0].abort_ends.set()


def test_the_library_never_ends_the_process_before_our_deadline(group):
    _, nccl = group
    assert nccl.watchdog_s >= 10 * TIMEOUT_S and nccl.watchdog_s >= 3600
    assert nccl.handling == "0", "an error of the group is for us to handle"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ, "the trainer's own groups are guarded as before"


def test_members_that_never_come_are_given_up_at_our_deadline(group):
    shared, nccl = group
    with pytest.raises(SharedGroupError, match=r"its 2 members did not connect in 0\.3 s"):
        shared.broadcast(torch.zeros(4))
    assert nccl.thread is not threading.current_thread() and nccl.thread.daemon, "the run could not be interrupted"


def test_waiting_for_members_ends_when_the_attempt_has_failed(group):
    shared, _ = group
    shared._timeout_s = 3600.0
    with pytest.raises(SharedGroupError, match="cancelled before its 2 members could connect"):
        shared.broadcast(torch.zeros(4), stop=lambda: True)


def test_a_broadcast_that_hangs_is_aborted_by_our_clock(group):
    shared, nccl = group
    nccl.members.set()
    work = shared.broadcast(torch.zeros(4))
    started = time.monotonic()
    with pytest.raises(SharedGroupError, match=r"a broadcast did not end in 0\.3 s"):
        shared.wait(work)
    assert time.monotonic() - started >= TIMEOUT_S
    shared.close()  # returns although aborting takes its time
    assert nccl.aborted.wait(60)


def test_later_broadcasts_begin_at_once(group):
    shared, nccl = group
    nccl.members.set()
    nccl.delivers = True
    for _ in range(2):
        shared.wait(shared.broadcast(torch.zeros(4)))
    assert nccl.thread is threading.current_thread(), "only the first one may block"
