"""Makes whole tensors of the changes that the trainer sends with `rollout.sync.delta`; weights/delta.py names them.

A rank keeps all tensors of the model, whole and by Hugging Face name, in host memory. A change is applied there, and
the whole tensor is loaded as any other: so it does not matter how the engine cuts, fuses, packs or quantises it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_RUN = 1 << 16


class WholeTensors:
    """The tensors that were loaded last.

    Attributes:
        tensors: by Hugging Face name, in host memory.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}  # of changes that have come in part

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Note tensors and changes, and yield every tensor of which something has come, whole.

        Raises:
            KeyError: a change came of a tensor that was never there.
        """
        for name, tensor in tensors:
            whole, _, part = name.partition("|")
            if not part:
                self.tensors[name] = tensor.to("cpu", copy=True)
                yield name, tensor
                continue
            parts = self._parts.setdefault(whole, {})
            parts[part] = tensor.to("cpu", copy=True)
            if len(parts) == 3:
                del self._parts[whole]
                places = places_of(parts["runs"], parts["places"])
                self.tensors[whole].view(-1)[places] = parts["values"]
                yield whole, self.tensors[whole]


def places_of(runs: Tensor, places: Tensor) -> Tensor:
    """Where in a tensor changed values lie [k] int64, from their numbers in each run and their places there."""
    starts = torch.arange(len(runs)) * _RUN + _RUN // 2
    return starts.repeat_interleave(runs.long()) + places.long()


def keep_tensors(model: Any, _tensors: Any) -> None:
    """Keep SGLang's tensors from now on; a call of `--custom-weight-loader clipo_delta.keep_tensors`."""
    if not hasattr(model, "_clipo_whole"):
        model._clipo_whole, load = WholeTensors(), model.load_weights
        model.load_weights = lambda tensors, *args, **kwargs: load(model._clipo_whole.take(tensors), *args, **kwargs)
