"""A sender whose servers fail goes on filling its buffers, because other ranks may have to gather to the end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clipo_megatron.runtime.shared_group import SharedGroupError
from clipo_megatron.sync.broadcast import _DoubleBuffer

SHARD = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))


class Group:
    """A group whose `fails` method raises, as where servers hang on GPUs; it notes what is called."""

    def __init__(self, fails: str):
        self.fails, self.called = fails, []

    def broadcast(self, tensor, stop):
        return self._note("broadcast")

    def wait(self, work, stop):
        self._note("wait")

    def _note(self, name):
        self.called.append(name)
        if name == self.fails:
            raise SharedGroupError(f"its members failed in {name}")
        return name


@pytest.mark.parametrize(
    ("fails", "called"), [("broadcast", ["broadcast"]), ("wait", ["broadcast", "broadcast", "wait"])]
)
def test_a_failure_is_noted_once_and_nothing_more_is_sent(fails, called):
    group = Group(fails)
    wire = _DoubleBuffer(group, SimpleNamespace(stopped=lambda: False), SHARD, 8, [])
    for _ in range(4):
        flat = wire.next_buffer(8)
        assert flat.numel() == 8
        if not wire.failure:
            wire.send(flat)
    wire.finish()
    assert wire.failure == f"its members failed in {fails}" and group.called == called
