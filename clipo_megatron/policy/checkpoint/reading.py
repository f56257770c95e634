"""Megatron's loading of a checkpoint, by readers that run nothing of what stands in its files.

Megatron and torch unpickle `.metadata` and the objects of a checkpoint without restriction. Here `.metadata` is read by
the reader that conversions use, and everything else as plain tensors and values.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.formats.metadata import read_metadata
from clipo_megatron.weights.formats.torch_dist_writer import torch_save_bytes


def loaded_state(template: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load the state that Megatron's sharded state dict `template` describes; collective.

    Raises:
        WeightsFolderError: a file is damaged, or holds more than tensors and plain values. Megatron's own errors: the
            checkpoint is of another architecture.
    """
    try:
        with _our_readers():
            return dist_checkpointing.load(
                template,
                str(folder),
                sharded_strategy=torch_dist.TorchDistLoadShardedStrategy(),
                **({"common_strategy": _common_strategy()} if _TAKES_A_STRATEGY else {}),
            )
    except CheckpointException as error:  # no Exception of its own, with those of all ranks in it
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise WeightsFolderError(f"{folder} cannot be loaded, says rank {rank}: {cause}") from cause


def read_plain(file: Path | io.BytesIO, name: object) -> Any:
    """Read tensors and plain values that `torch.save` has written; `name` is that of the file in messages.

    Raises:
        WeightsFolderError: it is damaged, or holds something else, of which nothing was run.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsFolderError(f"{name} is damaged, or holds more than tensors and plain values: {reason}") from error


# Megatron 0.16 has a strategy for what is the same on all ranks; later releases read it by a function.
_TAKES_A_STRATEGY = hasattr(common, "TorchCommonLoadStrategy")


def _common_strategy() -> Any:
    class CommonState(common.TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
            return _common_state(checkpoint_dir)

    return CommonState()


def _common_state(checkpoint_dir: str | Path) -> dict[str, Any]:
    """Read what is the same on all ranks."""
    file = Path(checkpoint_dir) / common.COMMON_STATE_FNAME
    found = read_plain(file, file)
    if not isinstance(found, dict):
        raise WeightsFolderError(f"{file} is damaged: it holds a {type(found).__name__} and no state")
    return found


class _CheckpointReader(FileSystemReader):
    """Reads `.metadata` once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
        return self._metadata


class _LoadPlanner(torch_dist.MCoreLoadPlanner):
    """Reads objects as plain values. They are the extra states of layers, which hold nothing without FP8."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        found = read_plain(value, f"{key} of the checkpoint")
        if not holds_nothing(found):
            # Transformer Engine would unpickle it.
            raise WeightsFolderError(
                f"the checkpoint has a state under {key}, and only FP8 training, which is not done here, writes one. "
                "Remove the checkpoint's folder to use an older one"
            )
        # The planner reads without restriction, so it gets what was written here.
        super().load_bytes(read_item, io.BytesIO(torch_save_bytes(found)))


def holds_nothing(state: Any) -> bool:
    """Whether an extra state of a layer is empty: None, a tensor without elements, or a list of such."""
    if isinstance(state, list):
        return all(map(holds_nothing, state))
    return state is None or (isinstance(state, Tensor) and not state.numel())


@contextmanager
def _our_readers() -> Iterator[None]:
    """Within, Megatron takes the readers and the planner of this module."""
    ours = [
        (torch_dist, "_get_filesystem_reader", lambda folder, **_: _CheckpointReader(folder)),
        (torch_dist, "MCoreLoadPlanner", _LoadPlanner),
    ]
    if not _TAKES_A_STRATEGY:
        ours.append((serialization, "load_common_state_dict", _common_state))
    theirs = [(module, name, getattr(module, name)) for module, name, _ in ours]
    try:
        for module, name, reader in ours:
            setattr(module, name, reader)
        yield
    finally:
        for module, name, reader in theirs:
            setattr(module, name, reader)
