"""Weights to servers on the trainer's own GPUs: the servers open the trainer's memory, and nothing is sent.

Every trainer rank gets each bucket whole (`weights.export`) in its own GPU's memory. A server with t ranks
stands on the GPUs of t neighbouring trainer ranks; each of its ranks is handed what opens the bucket of the trainer
rank on its GPU, and takes its share of the tensors from there. Buckets go one after the other: a bucket's memory is
needed until all servers have answered.

On a CPU the same is done with shared memory, which any process of the machine can open. That is what tests run; memory
handles of GPUs, and which rank of a server stands on which GPU, were never tried on GPUs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor
from torch import multiprocessing as shared_memory

from clipo_megatron.sync.attempt import Attempt, SyncTarget
from clipo_megatron.sync.checksums import Sums
from clipo_megatron.sync.served import Order, ServedSync
from clipo_megatron.weights.export import Bucket, export_buckets

# Where SGLang has the class that its unpickler expects in place of ours.
_THEIRS = b"csglang.srt.weight_sync.tensor_bucket\nFlattenedTensorMetadata\n"


class IpcSync(ServedSync):
    """Transport `ipc`; see the module."""

    def _transfer(self, order: Order, attempt: Attempt | None) -> Sums | None:
        sums = None
        if order.verify and self.shard.takes_part:
            sums = Sums(self.shard.spec, order.tp_sizes, order.kind)

        async def begin(attempt: Attempt) -> None:
            await attempt.each("pause", lambda each: each.server.pause(self.in_flight, deadline_s=attempt.deadline()))
            await attempt.each("begin", lambda each: each.server.begin_update(deadline_s=attempt.deadline()))

        async def end(attempt: Attempt) -> None:
            version = order.version
            await attempt.each("end", lambda each: each.server.end_update(version, deadline_s=attempt.deadline()))

        self._together(lambda: None, begin, attempt)
        for place, (bucket, flat) in enumerate(self._buckets(), start=1):
            self._hand_over(bucket, flat, attempt, last=place == len(self.plan.buckets))
            if sums is not None and self.shard.rank == 0:
                sums.add(bucket, flat)
        self._together(lambda: None, end, attempt)
        return sums

    def _buckets(self) -> Iterator[tuple[Bucket, Tensor]]:
        return export_buckets(self.plan, self.shard.chunks(), self.shard.holder)

    def _hand_over(self, bucket: Bucket, flat: Tensor, attempt: Attempt | None, *, last: bool) -> None:
        """Have all servers take one bucket; collective."""
        payloads = self._together(lambda: payload(bucket, flat), None, attempt)

        async def take(attempt: Attempt) -> None:
            places = accumulate((member.state.tp for member in self._members), initial=0)
            place = dict(zip((member.url for member in self._members), places, strict=False))

            async def one(member: SyncTarget) -> None:
                first = place[member.url]
                theirs = payloads[first : first + member.state.tp]
                await member.server.receive_handles(theirs, last=last, deadline_s=attempt.deadline())

            await attempt.each("buckets", one)

        self._together(lambda: None, take, attempt)


@dataclass
class FlattenedTensorMetadata:
    """Stands for SGLang's class of this name: one tensor's place, in bytes, in a flat bucket."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def payload(bucket: Bucket, flat: Tensor) -> bytes:
    """What opens a bucket's flat buffer [numel] in another process, and says what is in it.

    SGLang unpickles it with a list of what it allows; ours is renamed to the one class of its own on that list. The
    memory must live until the other process is done with it.
    """
    metadata, start = [], 0
    for name, tensor in bucket.views(flat):
        end = start + tensor.nbytes
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, end, tensor.nbytes))
        start = end
    stream = io.BytesIO()
    before = shared_memory.get_sharing_strategy()
    # By name, not by descriptor: the reader is no child of this process.
    shared_memory.set_sharing_strategy("file_system")
    try:
        # This protocol names classes in plain lines, which can be exchanged.
        ForkingPickler(stream, 2).dump({"flattened_tensor": flat.view(torch.uint8), "metadata": metadata})
    finally:
        shared_memory.set_sharing_strategy(before)
    ours = f"c{__name__}\n{FlattenedTensorMetadata.__name__}\n".encode()
    return stream.getvalue().replace(ours, _THEIRS)
