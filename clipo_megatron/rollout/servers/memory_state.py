"""Which memory a server has given back. Engines crash when they offload twice or onload what they still have."""

from __future__ import annotations

from collections.abc import Sequence

from clipo_megatron.rollout.engine import Memory


class MemoryState:
    """What one server has offloaded, as its client remembers it: no engine can be asked.

    `boot` identifies a start of the server; after a restart nothing is offloaded.
    """

    def __init__(self):
        self._offloaded: set[Memory] = set()
        self._boot = ""

    def to_offload(self, what: Sequence[Memory], boot: str) -> list[Memory]:
        """The part of `what` that the server still has."""
        return [each for each in what if each not in self._since(boot)]

    def to_onload(self, what: Sequence[Memory], boot: str) -> list[Memory]:
        """The part of `what` that the server has given back."""
        return [each for each in what if each in self._since(boot)]

    def offloaded(self, what: Sequence[Memory]) -> None:
        """Record that the server gave these back."""
        self._offloaded |= set(what)

    def onloaded(self, what: Sequence[Memory]) -> None:
        """Record that the server took these again."""
        self._offloaded -= set(what)

    def _since(self, boot: str) -> set[Memory]:
        if boot != self._boot:
            self._offloaded, self._boot = set(), boot
        return self._offloaded
