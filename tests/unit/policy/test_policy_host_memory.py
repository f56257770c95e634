"""What leaves a GPU is copied to page-locked host memory, is complete before it is freed, and finds that memory again.

A CPU stands in for the GPU; what is asked of torch is noted, since page-locked memory cannot be had without a driver.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clipo_megatron.policy import host_memory
from clipo_megatron.policy.host_memory import HostedTensors


@pytest.fixture
def asked(monkeypatch):
    """What is asked of torch, in order: host memory, copies, waits for copies, and memory that is freed or made."""
    heard: list[tuple[str, bool]] = []
    empty, copy, resize = torch.empty, Tensor.copy_, torch.UntypedStorage.resize_

    def make(*sizes, pin_memory=False, **options):
        if pin_memory:
            heard.append(("host memory", True))
        return empty(*sizes, **options)

    def copied(self, source, non_blocking=False):
        heard.append(("copy", non_blocking))
        return copy(self, source)

    def resized(self, size):
        heard.append(("memory", size > 0))
        return resize(self, size)

    device = SimpleNamespace(
        has_gpu=True, device=torch.device("cpu"), synchronize=lambda: heard.append(("complete", True))
    )
    monkeypatch.setattr(host_memory, "platform", lambda: device)
    monkeypatch.setattr(torch, "empty", make)
    monkeypatch.setattr(Tensor, "copy_", copied)
    monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)
    return heard


def test_turns_with_page_locked_memory_that_is_kept(asked):
    tensors = [torch.arange(5.0), torch.arange(3)]
    before = [each.clone() for each in tensors]
    asked.clear()
    hosted, copies = HostedTensors(), [("copy", True)] * 2
    there, back = [*copies, ("complete", True), *[("memory", False)] * 2], []
    hosted.take(tensors)
    assert asked == [("host memory", True), *there], "a copy under way would read what is freed"
    for _ in range(2):
        asked.clear()
        hosted.give_back()
        back = [("memory", True), ("copy", True)] * 2
        assert asked == [*back, ("complete", True)]
        assert all(torch.equal(each, was) for each, was in zip(tensors, before, strict=True))
        asked.clear()
        hosted.take(tensors)
        assert asked == there, "page-locking memory anew takes seconds"
