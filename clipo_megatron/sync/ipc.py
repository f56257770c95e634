"""Weights to servers on the trainer's own GPUs: the servers open the trainer's memory, and nothing is sent.

Every trainer rank gathers each whole bucket (`weights.export`) into its GPU's memory. A server with t ranks shares the
GPUs of t neighbouring trainer ranks; each of its ranks gets a handle to the bucket on its GPU and copies its share of
the tensors. A bucket's memory is needed until all servers have answered, so buckets follow one after the other.

On a CPU the handles are those of shared memory, which any process of the machine can open. Tests cover this case;
handles of GPU memory, and the order of a server's ranks on the GPUs, were never tried on GPUs.
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

from clipo_megatron.rollout.servers.server import LiveServer
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
            await attempt.each("pause", lambda each: each.server.pause(self.in_flight, deadline_s=attempt.deadline()))
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
        payloads = self._run_phase(lambda: payload(bucket, flat), None, attempt)

        async def take(attempt: Attempt) -> None:
            offsets = accumulate((target.state.tp for target in self._targets), initial=0)
            first_rank = dict(zip((target.url for target in self._targets), offsets, strict=False))

            async def one(target: LiveServer) -> None:
                first = first_rank[target.url]
                theirs = payloads[first : first + target.state.tp]
                await target.server.receive_handles(theirs, last=last, deadline_s=attempt.deadline())

            await attempt.each("buckets", one)

        self._run_phase(lambda: None, take, attempt)


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

    SGLang unpickles allowed classes only, so our metadata class is renamed to theirs. The memory must live until the
    other process has copied it.
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
        ForkingPickler(stream, 2).dump({"flattened_tensor": flat.view(torch.uint8), "metadata": metadata})
    finally:
        shared_memory.set_sharing_strategy(before)
    ours = f"c{__name__}\n{FlattenedTensorMetadata.__name__}\n".encode()
    return stream.getvalue().replace(ours, _THEIRS)
