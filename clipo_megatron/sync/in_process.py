"""Weight sync with an engine in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from clipo_megatron.rollout.engine import Engine


class WeightSource(Protocol):
    """Something that exports the policy's weights."""

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors by Hugging Face name; collective over the ranks of a replica."""
        ...


class InProcessSync:
    """Streams the policy's weights into the engine of each rank."""

    def __init__(self, source: WeightSource, engine: Engine):
        self.source, self.engine = source, engine

    def update_weights(self, version: int) -> None:
        """Load the newest weights into the engine; after it returns, only these generate."""
        self.engine.load_weights(self.source.export(), version=version)

    def offload(self) -> None:
        """Does nothing: engine and policy fit into memory together."""

    def close(self) -> None:
        """Does nothing."""
