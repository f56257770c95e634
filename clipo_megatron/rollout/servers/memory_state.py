"""What memory a server has given back: engines die of giving back twice, or of taking what they have."""

from __future__ import annotations

from collections.abc import Sequence

from clipo_megatron.rollout.engine import Memory


class Released:
    """Kept by a server's client, because no engine says it of itself; forgotten when the server was restarted."""

    def __init__(self):
        self._what: set[Memory] = set()
        self._boot = ""

    def to_release(self, what: Sequence[Memory], boot: str) -> list[Memory]:
        """Of `what`, that which the server still has."""
        return [each for each in what if each not in self._of(boot)]

    def to_restore(self, what: Sequence[Memory], boot: str) -> list[Memory]:
        """Of `what`, that which the server has given back."""
        return [each for each in what if each in self._of(boot)]

    def released(self, what: Sequence[Memory]) -> None:
        """These were given back."""
        self._what |= set(what)

    def restored(self, what: Sequence[Memory]) -> None:
        """These were taken again."""
        self._what -= set(what)

    def _of(self, boot: str) -> set[Memory]:
        if boot != self._boot:
            self._what, self._boot = set(), boot
        return self._what
