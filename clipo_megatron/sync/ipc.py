"""Weights to servers on the trainer's own GPUs: the servers open the trainer's memory, and nothing is sent.

Every trainer rank gathers each whole bucket (`weights.export`) into its GPU's memory. Each rank of a server gets a
handle to the bucket on its GPU, and copies its share of the tensors. A bucket's memory is needed until all servers have
answered, so buckets follow one after the other.

A GPU has another number in each process, so it is known by its UUID: `clipo serve` registers those of a server's ranks,
and a handle names its own. Where nobody has named a server's GPUs, its t ranks share those of t neighbouring trainer
ranks, in the order of the servers' URLs.

On a CPU the handles are those of shared memory, which any process of the machine can open. Tests cover this case, and
what a handle of GPU memory says; handles were never opened on GPUs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch import multiprocessing as shared_memory
from torch.multiprocessing import reductions

from clipo_megatron.rollout.servers.server import Fault, LiveServer, ServerError
from clipo_megatron.runtime.platform import platform
from clipo_megatron.sync.attempt import Attempt
from clipo_megatron.sync.checksums import Sums
from clipo_megatron.sync.served import AttemptPlan, ServedSync
from clipo_megatron.weights.export import Bucket, export_buckets

# The class that SGLang's unpickler allows; ours is renamed to it.
_THEIRS = b"csglang.srt.weight_sync.tensor_bucket\nFlattenedTensorMetadata\n"


class IpcSync(ServedSync):
    """The transport `ipc`, which the module describes."""

    def _transfer(self, plan: AttemptPlan, attempt: Attempt | None) -> Sums | None:
        sums = None
        if plan.verify and self.shard.takes_part:
            sums = Sums(self.shard.spec, plan.tp_sizes, plan.kind)

        async def begin(attempt: Attempt) -> None:
            await self._pause(attempt, plan.changes)
            await attempt.each("begin", lambda each: each.server.begin_update(deadline_s=attempt.deadline()))

        async def end(attempt: Attempt) -> None:
            version = plan.version
            await attempt.each("end", lambda each: each.server.end_update(version, deadline_s=attempt.deadline()))

        self._run_phase(lambda: None, begin, attempt)
        for number, (bucket, flat) in enumerate(self._buckets(), start=1):
            self._hand_over(bucket, flat, attempt, last=number == len(self.export_plan.buckets))
            if sums is not None and self.shard.rank == 0:
                sums.add(bucket, flat)
        self._run_phase(lambda: None, end, attempt)
        return sums

    def _buckets(self) -> Iterator[tuple[Bucket, Tensor]]:
        return export_buckets(self.export_plan, self.shard.chunks(), self.shard.holder)

    def _hand_over(self, bucket: Bucket, flat: Tensor, attempt: Attempt | None, *, last: bool) -> None:
        """Let all servers copy one bucket; collective."""
        handles = self._run_phase(lambda: (platform().device_uuid, payload(bucket, flat)), None, attempt)

        async def take(attempt: Attempt) -> None:
            ranks = ranks_of(self._targets, [uuid for uuid, _ in handles])

            async def one(target: LiveServer) -> None:
                if (mine := ranks[target.url]) is None:
                    reason = (
                        f"of its GPUs, {', '.join(target.gpus)}, the trainer has not all, so it cannot open the weights"
                    )
                    raise ServerError(target.url, Fault.unsupported, reason)
                theirs = [handles[rank][1] for rank in mine]
                await target.server.receive_handles(theirs, last=last, deadline_s=attempt.deadline())

            await attempt.each("buckets", one)

        self._run_phase(lambda: None, take, attempt)


def ranks_of(targets: Sequence[LiveServer], uuids: Sequence[str]) -> dict[str, list[int] | None]:
    """The trainer rank on the GPU of each rank of a server, by the server's URL; None where one is on no such GPU.

    Args:
        targets: the servers that are updated, ordered by URL.
        uuids: of each trainer rank's GPU; "" on a CPU.
    """
    rank_on = {uuid: rank for rank, uuid in reversed(list(enumerate(uuids)))}
    found: dict[str, list[int] | None] = {}
    for target, first in zip(targets, accumulate((each.state.tp for each in targets), initial=0), strict=False):
        if target.gpus:
            ranks = [rank_on.get(uuid) for uuid in target.gpus]
        else:
            ranks = [rank if rank < len(uuids) else None for rank in range(first, first + target.state.tp)]
        found[target.url] = None if None in ranks else ranks
    return found


@dataclass
class FlattenedTensorMetadata:
    """Stands in for SGLang's class of this name: one tensor's byte range in a flat bucket."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def payload(bucket: Bucket, flat: Tensor) -> bytes:
    """A pickle that opens a bucket's flat buffer [numel] in another process and describes its tensors.

    SGLang unpickles allowed classes only, so our metadata class is renamed to theirs. A GPU is named by its UUID, which
    SGLang takes in place of torch's number of a device (0.5.23: srt/utils/patch_torch.py). The memory must live until
    the other process has copied it.
    """
    metadata, start = [], 0
    for name, tensor in bucket.views(flat):
        end = start + tensor.nbytes
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, end, tensor.nbytes))
        start = end
    stream = io.BytesIO()
    before = shared_memory.get_sharing_strategy()
    # Shared by file name, not by descriptor, because the reader is not a child of this process.
    shared_memory.set_sharing_strategy("file_system")
    try:
        # Protocol 2 names classes in plain lines, which can be replaced.
        handle = _Handle(flat.view(torch.uint8))
        ForkingPickler(stream, 2).dump({"flattened_tensor": handle, "metadata": metadata})
    finally:
        shared_memory.set_sharing_strategy(before)
    ours = f"c{__name__}\n{FlattenedTensorMetadata.__name__}\n".encode()
    return stream.getvalue().replace(ours, _THEIRS)


class _Handle:
    """A tensor that is pickled as torch pickles it for another process, but with its GPU's UUID."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        named = platform().device_uuid
        if named:
            place = list(signature(rebuild).parameters).index("storage_device")
            arguments = (*arguments[:place], named, *arguments[place + 1 :])
        return rebuild, arguments
