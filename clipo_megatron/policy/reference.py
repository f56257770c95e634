"""The reference policy: the weights that the run began with, from which the KL penalty measures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from clipo_megatron.policy.host_memory import HostedTensors
from clipo_megatron.policy.trainable import Trainable


class ReferencePolicy:
    """A copy of the policy's weights as they are when this is made, on this rank.

    There is no second model: to compute with the copy, it changes places with the weights in training.
    """

    def __init__(self, policy: Trainable):
        self._policy = policy
        self._weights = [parameter.detach().clone() for parameter in policy.stage.parameters()]
        self._hosted = HostedTensors()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the policy's stage computes with the reference policy's weights."""
        self._policy.pre_mutation_hook()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def offload(self) -> None:
        """Move the copy into host memory."""
        self._hosted.take(self._weights)

    def onload(self) -> None:
        """Move the copy back to the device."""
        self._hosted.give_back()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, other in zip(self._policy.stage.parameters(), self._weights, strict=True):
            held = parameter.data.clone()
            parameter.data.copy_(other)
            other.copy_(held)
