"""Weights into an engine of the same process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from clipo_megatron.rollout.engine import Engine


class WeightSource(Protocol):
    """Whoever can export the policy: a collective over the ranks of a replica."""

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and whole tensors."""
        ...


class InProcessSync:
    """Streams the export of the policy into the engine, bucket by bucket; every rank of a replica has an engine."""

    def __init__(self, source: WeightSource, engine: Engine):
        self.source, self.engine = source, engine

    def update_weights(self, version: int) -> None:
        """Give the engine the newest weights. After it returns, only these generate."""
        self.engine.load_weights(self.source.export(), version=version)

    def offload(self) -> None:
        """Nothing to do: engine and policy both fit."""

    def close(self) -> None:
        """Nothing to free."""
